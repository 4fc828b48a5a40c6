"""Compare evaluations: intervals, paired tests, non-inferiority."""
