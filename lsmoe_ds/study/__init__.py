"""Studies: a family of recipes on the same data and steps, and one table that compares them."""
