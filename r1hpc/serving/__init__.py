"""Serve a model as a job: its process, its gate, its address, its end."""
