"""What a run says about itself: attempts with their causes, metrics per step, NVML readings per node."""
