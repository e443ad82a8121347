"""Training, evaluation and export of a run."""
