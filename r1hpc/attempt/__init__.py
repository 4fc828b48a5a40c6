"""Run one attempt: begin on the batch host, run every rank, end with a cause and the next step."""
