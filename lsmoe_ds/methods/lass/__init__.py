"""LaSS: each direction trains and uses a sub-network, found by the magnitude of fine-tuned weights."""
