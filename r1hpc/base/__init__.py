"""What every package shares: errors, units, crash-safe files, the run folder, the command-line frame.

Standard library only, so that the login node pays nothing for importing it.
"""
