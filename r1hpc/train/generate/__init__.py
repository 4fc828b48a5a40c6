"""Generate, evaluate and teach: the stages that write completions."""
