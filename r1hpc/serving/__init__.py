"""Serve a model as a job: the server's process, the guard of its key, its address, its end."""
