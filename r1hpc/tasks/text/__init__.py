"""Encode and decode text, and format prompts."""
