"""Read documents from text, JSONL, Parquet, Arrow and HDF5 files."""
