"""Clean documents: quality rules, language, personal data, duplicates, contamination."""
