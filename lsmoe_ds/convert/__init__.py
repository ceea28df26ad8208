"""Checkpoints to consolidated and dense models."""
