"""Slurm: the job script, its submission, SLURM_* on the ranks, requeue, accounting, the cluster probe.

The only package that runs Slurm's commands and the only one that knows submitit.
"""
