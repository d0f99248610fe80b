"""What a run needs from the machine: BLAS and limits, memory meters, files and child processes."""
