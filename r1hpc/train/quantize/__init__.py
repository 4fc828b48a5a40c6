"""Quantize a model and measure what it costs."""
