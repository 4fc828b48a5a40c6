"""Compute what a run needs before it costs anything: nodes, batch, memory, hours.

Reads model files, asks no cluster.
"""
