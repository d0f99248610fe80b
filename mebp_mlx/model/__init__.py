"""A checkpoint as data and as frozen matrices, and the LoRA parameters beside it."""

NO_LABEL = -100  # a target that is no label
