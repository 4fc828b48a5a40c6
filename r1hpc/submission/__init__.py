"""Plan and submit runs and chains of stages."""
