"""Tell the state of a run and why an attempt ended, from its folder and from Slurm."""
