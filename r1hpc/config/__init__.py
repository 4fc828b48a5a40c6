"""Load YAML files and overrides into one RunConfig, and freeze it with the code that a run uses.

The only package that imports omegaconf.
"""
