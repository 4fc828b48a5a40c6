"""Define every setting: its type, its default, its range and its meaning."""
