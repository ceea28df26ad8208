"""Launchers, the processes that they start, and how these processes join and watch each other."""
