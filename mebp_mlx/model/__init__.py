"""A checkpoint as data and as frozen matrices, and its LoRA parameters."""

NO_LABEL = -100  # the target of a token without a label
