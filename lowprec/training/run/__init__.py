"""A run from its configuration, from the first check to the saved model."""
