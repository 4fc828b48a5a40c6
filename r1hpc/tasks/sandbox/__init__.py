"""Run custom code in a process that can be killed."""
