"""Serve a model as a job: the server's process, the gate that requires its key, its address, its end."""
