"""Record and read what a run reports: attempts with their causes, metrics per step, NVML per node."""
