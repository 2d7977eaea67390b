"""q* sampling from pairs of Hugging Face language models."""
