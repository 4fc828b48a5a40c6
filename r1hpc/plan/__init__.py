"""Compute a run before anything is spent: topology, batch, memory, hours. Pure arithmetic."""
