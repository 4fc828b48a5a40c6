"""Names of the files and folders of a dataset."""

PARTS = "parts"
TOKENS = "tokens"
CHECKSUMS = "tokens.crc32c"
INPUTS = "inputs.json"
TOKENIZER = "tokenizer"
DECISIONS = "decisions.parquet"
MADE_WITH = "made_with.json"
"""Digests of files beside the inputs, to notice that they have changed. No part of the dataset or its id."""
INPUT_STATES = "input_states.json"
"""Size, time and, where it was asked for, digest of each input. No part of the dataset or its id."""
LEFT_OUT = "left_out.json"
"""Records that a plain recipe left out, by source and rule. No part of the dataset or its id, which counts
but some of them, under one rule."""
GENERATED = "generated"
"""Where the documents of a generated source come from: generated/<source>/<name of the span>.parquet."""
SEGMENT_OFFSETS = "seg_offsets"
SEGMENT_ROLES = "seg_role"
ARRAYS = (TOKENS, "doc_offsets", "doc_source", "doc_hash", "doc_input", "doc_position")
ROLE_ARRAYS = (SEGMENT_OFFSETS, SEGMENT_ROLES)
"""Only datasets of traces have these."""


def part_name(number: int) -> str:
    return f"part-{number:05d}"
