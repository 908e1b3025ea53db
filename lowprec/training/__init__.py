"""Training runs: the callback of the Hugging Face Trainer, loops on Accelerate, and runs from a
configuration."""
