"""A run's metrics for the tools a group already uses: TensorBoard, W&B, Prometheus; live, or afterwards.

Live, a keeper (keeper.py) on the batch host starts one feeder (feeder.py) per tracker, and starts it again
when it dies or hangs. A feeder reads metrics/train.jsonl and knows nothing of the ranks, nor they of it. The
run's own records stay the truth: whatever happens to a tracker, it is fed from them again.
"""
