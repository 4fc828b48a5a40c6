"""Check a cluster before hours are spent on it.

Collectors (`collect_…`) look and never judge; judges (`judge_…`) are pure functions over the findings.
"""
