"""Names of the files and folders of a dataset."""

PARTS = "parts"
TOKENS = "tokens"
CHECKSUMS = "tokens.crc32c"
INPUTS = "inputs.json"
TOKENIZER = "tokenizer"
ARRAYS = (TOKENS, "doc_offsets", "doc_source", "doc_hash", "doc_input", "doc_position")


def part_name(number: int) -> str:
    return f"part-{number:05d}"
