"""What a run needs of memory, known before anything of it is allocated."""
