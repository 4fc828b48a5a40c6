"""Pure arithmetic before anything is spent: topology, batch, shape, memory, FLOPs, saves, warnings.

    from r1hpc.plan.run import make_plan
    plan = make_plan(config, gpus_per_node=8, vocab_size=32000, time_limit_s=86400)

No torch and no transformers: the login node asks these questions.
"""
