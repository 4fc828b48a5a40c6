"""Checkpoints are killed, corrupted, starved of disk and written by two incarnations at once here."""
