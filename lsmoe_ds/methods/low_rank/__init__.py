"""Low-rank matrices of languages beside linear layers."""
