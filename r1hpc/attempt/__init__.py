"""The life of one attempt: begin on the batch host, run on every rank, end with a cause and what follows.

The batch script (or the local supervisor) calls begin, starts the ranks, calls end. This package may use
every other one; only commands import it.
"""
