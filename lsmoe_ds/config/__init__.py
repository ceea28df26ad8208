"""The recipe: its sections, how its file is read, and how errors in it are explained."""
