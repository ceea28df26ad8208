"""Conditional language-specific routing."""
