"""Judge answers: exact, numeric, algebraic, or by a task of its own."""
