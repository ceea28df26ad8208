"""What a recipe costs, computed from the recipe alone."""
