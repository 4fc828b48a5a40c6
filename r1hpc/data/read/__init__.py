"""Read verified samples in a resumable order, mixed and packed as the run asks."""
