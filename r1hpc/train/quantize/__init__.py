"""Work for r1hpc.export: model folders of checkpoints and GGUF files, integer weights and what they cost."""
