"""Measure a server's throughput and latency."""
