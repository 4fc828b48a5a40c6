"""Read the shape of a model from its configuration and weight files."""
