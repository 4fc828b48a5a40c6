"""Read a model folder without torch: its shape, the headers of its weights, its chat template."""
