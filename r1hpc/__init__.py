"""r1hpc: reasoning training on Slurm clusters that loses nothing to preemption."""

__version__ = "0.1.0"
