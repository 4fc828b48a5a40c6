"""Run the stages that write completions: traces, generate and evaluate."""
