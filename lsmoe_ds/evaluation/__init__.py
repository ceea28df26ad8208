"""Evaluation: translate and score text, and test whether scores of systems differ."""
