"""Run the training loop: steps, records, saves, stops."""
