"""r1hpc: reasoning training on Slurm clusters that loses nothing to preemption.

    from r1hpc import Run, submit

Both come from r1hpc.api when they are first asked for: `import r1hpc` loads nothing else.
"""

__version__ = "0.1.0"
