"""Send metrics to TensorBoard, W&B and Prometheus.

A keeper on the batch host starts one feeder per tracker, and starts it again when it dies.
"""
