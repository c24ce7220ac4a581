"""The one training loop on a DeepSpeed engine, its losses and its settings."""
