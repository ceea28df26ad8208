"""Stored weights and optimizer state: reading, writing and resharding them."""
