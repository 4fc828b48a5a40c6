"""Estimate GPU-hours with P10, P50 and P90."""
