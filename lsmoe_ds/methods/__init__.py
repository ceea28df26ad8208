"""Define the hooks of a method (``base``), and list the methods that there are (``registry``)."""
