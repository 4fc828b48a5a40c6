"""Read, place and advance a chain: stages tied by dependencies."""
