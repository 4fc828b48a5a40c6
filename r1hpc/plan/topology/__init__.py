"""Divide batch, sequence and work over nodes and GPUs; look up what a GPU can do."""
