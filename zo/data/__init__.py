"""Rows, encoding, batches and tasks."""
