"""Control a rank: stop requests, heartbeats, and the watchdog that ends a hang."""
