"""Train on tokens or traces: pretrain and SFT."""
