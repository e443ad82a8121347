"""Bytes, files and the machine."""
