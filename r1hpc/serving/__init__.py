"""A server of a model as the life of a job: its process, its gate, its address, and when it ends."""
