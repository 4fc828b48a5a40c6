"""A job rehearsed on purpose: how it is disturbed, and whether its records show that nothing was lost."""
