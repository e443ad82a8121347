"""Metrics, progress and the timeline of a run."""
