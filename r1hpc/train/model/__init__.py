"""Build, place and export the model, and compute its losses."""
