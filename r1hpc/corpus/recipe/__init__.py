"""Read and check a recipe, the YAML file that defines a dataset."""
