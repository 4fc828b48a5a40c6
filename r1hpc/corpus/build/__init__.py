"""Build a dataset stage by stage: tokenize, encode, write, publish."""
