"""The ranks of a run: mesh, process group, failures, slices."""
