"""Compute a run before it costs anything: topology, batch, memory, hours. Pure arithmetic."""
