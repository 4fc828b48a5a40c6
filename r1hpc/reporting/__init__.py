"""Show runs and hours: text, HTML page, charts, live screen."""
