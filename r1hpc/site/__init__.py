"""What a cluster is like before hours are spent on it: facts of its nodes and of Slurm, judged.

Collectors (`collect_…`) look and never judge; judges (`judge_…`) are pure functions over what was found.
"""
