"""Keys, recipes and command lines."""
