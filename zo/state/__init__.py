"""The log and what is made of it: replay, run folder, snapshots."""
