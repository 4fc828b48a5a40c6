"""The same small training job, written five times: as the users of each tool would write it."""
