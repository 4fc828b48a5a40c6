"""Send metrics to TensorBoard, W&B and Prometheus.

A keeper on the batch host starts one feeder per tracker, and restarts it when it dies.
"""
