"""A Hugging Face model as blocks: layout, weights, lockstep."""
