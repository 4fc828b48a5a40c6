"""Talk to Slurm: the job script, submission, SLURM_* on the ranks, requeue, accounting, probe.

Only this package runs Slurm commands and knows submitit.
"""
