"""Sample NVML and summarize the readings."""
