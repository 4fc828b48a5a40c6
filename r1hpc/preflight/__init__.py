"""Check a cluster before hours are spent on it.

For `doctor`, collectors (`collect_…`) return facts and never judge; judges (`judge_…`) are pure functions
from facts to findings. disturb.py is for `drill`.
"""
