"""Sample completions, with torch or vLLM."""
