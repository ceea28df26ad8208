"""Bottleneck adapters after layers, one for each language pair, pair of families, or language."""
