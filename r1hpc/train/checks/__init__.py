"""Check model, data and settings of a training stage before its job is queued."""
