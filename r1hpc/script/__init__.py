"""Run anybody's own training script as a stage: checked before the queue, started by every rank, resumed."""
