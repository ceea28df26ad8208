"""Analyze which experts a trained model uses for which tasks."""
