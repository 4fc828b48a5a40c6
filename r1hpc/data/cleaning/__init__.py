"""Judging and repairing text: named rules with their papers' numbers, language, personal data, near
duplicates.

Rules see a batch of documents at once, as arrays over their bytes (see batch): a few NumPy calls for a
megabyte instead of a Python loop over its words.
"""
