"""The job script (job.bash) and Python share exit statuses, and the reasons why Slurm ends a job."""
