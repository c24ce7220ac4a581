"""The embedded world: a small closed universe with a known truth, its rows, tokenizer and base model."""
