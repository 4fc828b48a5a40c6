"""For PYTHONPATH alone: Python loads `sitecustomize` from here at the start of a script."""
