"""Share the work of a build among processes and jobs, and resume it."""
