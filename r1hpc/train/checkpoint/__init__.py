"""Save and load DeepSpeed's state, in the background if configured."""
