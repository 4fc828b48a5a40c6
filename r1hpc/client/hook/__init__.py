"""A folder for PYTHONPATH: Python loads `sitecustomize` from here at the start of a script."""
