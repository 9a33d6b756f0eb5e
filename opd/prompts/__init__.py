"""Images and a question become a `Prompt`: the model's own chat template, tokenizer and image
processor."""
