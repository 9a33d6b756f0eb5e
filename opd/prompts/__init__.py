"""Turns images and a question into a `Prompt`, with the model's own chat template, tokenizer and
image processor."""
