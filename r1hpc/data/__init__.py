"""Read datasets for training, verified and in a reproducible order."""
