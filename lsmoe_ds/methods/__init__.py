"""The hooks of a method (``base``), what layers know of the sentences, and one package for each method."""
