"""Run one job with many settings: every point is an ordinary run with its own folder."""
