"""Provide questions: built-in tasks, files, reasoning-gym, custom code."""
