"""Steps without gradients inside training loops that exist already."""
