"""Models in other forms: exports, imports, grown models and translated corpora."""
