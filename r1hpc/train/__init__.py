"""Training on the ranks of one attempt: `stages.run(job)` returns an Outcome. Knows nothing of Slurm.

To read a step of reinforcement learning, open rl.py, collect.py, judge.py, sampling.py, rollout.py,
update.py, algorithms.py and loop.py in this order; of pretraining or fine-tuning, supervised.py and loop.py.
"""
