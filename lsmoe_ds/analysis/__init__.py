"""What the trained model learned to do."""
