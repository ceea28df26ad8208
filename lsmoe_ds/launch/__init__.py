"""Launchers, the processes that they start, and what they say to one another."""
