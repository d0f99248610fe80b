"""Rows for training: read, tokenized once in a child process, and put into batches."""
