"""Build datasets: read sources, clean, deduplicate, tokenize, write shards."""
