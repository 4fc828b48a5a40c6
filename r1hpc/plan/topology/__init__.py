"""Divide batch, sequence and work over nodes and GPUs."""
