"""Load YAML files and dotted overrides into one frozen RunConfig."""
