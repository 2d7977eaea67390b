"""A run over a dataset: its options, what is done with each prompt, and the files that it writes and reads back."""
