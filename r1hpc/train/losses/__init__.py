"""Compute losses and log-probabilities."""
