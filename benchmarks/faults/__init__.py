"""Faults of a Slurm cluster, and what each way of going on loses to them. See __main__.py."""
