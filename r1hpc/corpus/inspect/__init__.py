"""Describe and audit a finished dataset."""
