"""`lsmoe convert`: what it makes, checks and records."""
