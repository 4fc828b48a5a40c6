"""Commit, verify, list and prune checkpoints. No torch here.

A checkpoint exists once `commit` has renamed its folder to `step-<n>`. It is used only after every byte in it
matched the digests in its manifest. See `store.CheckpointStore`.
"""
