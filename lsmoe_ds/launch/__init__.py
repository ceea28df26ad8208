"""Launchers, the processes that they start, and how these processes meet and watch each other."""
