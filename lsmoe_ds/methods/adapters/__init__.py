"""Bottleneck adapters of language pairs, families or languages, after layers."""
