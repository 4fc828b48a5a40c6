"""Read and check a recipe, the YAML file that says how a dataset is made."""
