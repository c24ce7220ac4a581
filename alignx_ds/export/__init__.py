"""A finished run for everybody else: Hugging Face checkpoints, PEFT adapters, dense models, evaluators' files."""
