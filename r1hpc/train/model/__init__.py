"""Build, place and export the model."""
