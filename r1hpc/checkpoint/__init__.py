"""The checkpoint package: commit, verify, list and prune what a run can be resumed from. No torch here.

A checkpoint exists once `commit` has renamed its folder to `step-<n>`; it is used only after every
byte in it matched the digests in its manifest. See `store.CheckpointStore`.
"""
