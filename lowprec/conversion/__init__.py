"""Convert the linear layers of a model to low precision: find them, decide on each, describe the
decisions in a plan, and apply them."""
