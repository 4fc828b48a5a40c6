"""From YAML files and dotted overrides to one frozen RunConfig. The only package that knows omegaconf."""
