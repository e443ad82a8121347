"""Weights that are visited block by block: stores, transfers, cache."""
