"""Diagnose an attempt from its records."""
