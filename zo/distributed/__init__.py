"""Ranks of a run: mesh shape, process group, failure attribution, slices of the weights."""
