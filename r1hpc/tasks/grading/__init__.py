"""Judge answers: exact, numeric, algebraic, or by a custom task."""
