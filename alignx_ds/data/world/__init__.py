"""The embedded world: a small made-up world with a known truth, its rows, its tokenizer and its base model."""
