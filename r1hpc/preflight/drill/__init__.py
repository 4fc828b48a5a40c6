"""Disturb a short run on purpose and check that nothing was lost."""
