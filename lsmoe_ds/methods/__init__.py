"""The hooks of a method (``base``), what layers know of the sentences, and a room for each method."""
