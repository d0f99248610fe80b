"""The machine and the operating system: BLAS, memory limits and meters, files, child processes."""
