"""What stands beside the shared layers of a model: one room for each method, and the registry that knows them."""
