"""Models in other forms: exports, imports, and what becomes of a run."""
