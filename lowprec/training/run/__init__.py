"""A training run: from its configuration, over its checks, to the saved model."""
