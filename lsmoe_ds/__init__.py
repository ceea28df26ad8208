"""Language-specific mixture-of-experts training for multilingual machine translation."""

__version__ = "0.1.0"
