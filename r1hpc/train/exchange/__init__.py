"""Trainer and rollout workers meet in files of the run folder."""
