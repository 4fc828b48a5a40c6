"""From YAML files and dotted overrides to one frozen RunConfig. The only room that knows omegaconf."""
