"""The training loop and what it stands on: DeepSpeed engine, stop agreement, checkpoints, watchdog.

Knows nothing of Slurm: `pretrain.run` returns FINISHED or STOPPED, and `launch` acts on it.
"""
