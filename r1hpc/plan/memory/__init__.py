"""Plan the memory of a rank and suggest what fits."""
