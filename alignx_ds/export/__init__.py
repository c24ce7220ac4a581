"""A finished run for other tools: Hugging Face checkpoints, PEFT adapters, dense models, files for evaluators."""
