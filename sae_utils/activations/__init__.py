"""Text, tokens, language models and their activations."""
