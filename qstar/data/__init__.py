"""Data in: the files of a dataset, their rows, and the prompts and answers in them."""
