"""Metrics, progress, record, page, trackers and timeline of a run."""
