"""Studies: train a family of recipes on the same data for the same steps, and compare them in one table."""
