"""What stands beside the shared layers of a model: the hooks of a method, and the registry that knows them all."""
