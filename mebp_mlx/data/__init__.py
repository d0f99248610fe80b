"""Training data: rows are read, tokenized once in a child process, and grouped into batches."""
