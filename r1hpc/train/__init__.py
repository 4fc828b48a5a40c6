"""Train on the ranks of one attempt. `workload.py` is the way in, `rank.py` starts a rank."""
