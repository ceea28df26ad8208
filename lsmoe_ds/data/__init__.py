"""Corpora: fetching, reading, cleaning, preparing and batching parallel text."""
