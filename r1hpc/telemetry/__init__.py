"""Record and read a run's data: attempts with their causes, metrics per step, NVML per node."""
