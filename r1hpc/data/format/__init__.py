"""Define the dataset format: Zarr v3 arrays, and a manifest that lists the files with their digests.

DIR/manifest.json           canonical JSON; its sha256 is the dataset id
DIR/dataset_id              that id, for people and for a cheap check
DIR/tokenizer/              tokenizer.json, loadable by tokenizers and transformers; none if made from ids
DIR/made_with.json, input_states.json, left_out.json      notes of the build; not in the manifest or the id
DIR/parts/part-00000/       one contiguous run of documents, owned by one writer
    tokens                  uint16 or uint32, one document after another, each closed by the EOS id
    tokens.crc32c           uint32 per inner chunk: binds the bytes of each chunk to this dataset
    doc_offsets             uint64, num_documents + 1, into this part's tokens
    doc_source              uint16, index into the manifest's sources
    doc_hash                uint64 x 2, xxh3-128 of the document's bytes of text (high, low)
    doc_input, doc_position uint32, uint64: which file of inputs.json, and where in it
    seg_offsets, seg_role   traces only: uint64, uint8; divide each document into prompt and completion
    inputs.json             the files this part was read from
    decisions.parquet       recipes with stage clean only: see corpus/clean/decisions.py
"""
