"""Let a training script take part in a run: resume, agree, save, record, leave. See run.attempt()."""
