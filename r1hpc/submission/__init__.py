"""From a command line to jobs: one run, or a chain of stages tied by dependencies.

definition   a chain file: its stages, what each needs, the references between them
folder       the paths of a chain under the run root
submission   one run: decide, freeze, start
advance      what each stage of a chain needs next, and doing it; safe to repeat after a kill
supervisor   the stages one after the other on this machine
state        where a chain stands
"""
