"""The recipe: its sections, how the file is read, and how errors are told."""
