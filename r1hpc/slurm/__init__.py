"""Talk to Slurm: the job script, submission, SLURM_* on the ranks, requeue, accounting, probe.

The only package that runs Slurm commands and the only one that knows submitit.
"""
