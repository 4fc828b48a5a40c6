"""Share the basics: errors, units, crash-safe files, the run folder, the command-line frame.

Standard library only (argcomplete for TAB alone), so that a login node pays nothing to import it.
"""
