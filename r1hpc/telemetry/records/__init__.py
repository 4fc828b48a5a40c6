"""Write and read the JSONL files of a run."""
