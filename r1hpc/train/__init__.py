"""Train on the ranks of one attempt: `stages.run(job)` returns an Outcome. Knows nothing of Slurm."""
