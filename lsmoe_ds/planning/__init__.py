"""Compute the costs of a recipe from the recipe alone."""
