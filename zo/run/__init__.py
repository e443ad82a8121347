"""Training, evaluation and export of one run."""
