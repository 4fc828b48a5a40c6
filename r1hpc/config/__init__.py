"""Load YAML files and dotted overrides into one frozen RunConfig. The only package that knows omegaconf."""
