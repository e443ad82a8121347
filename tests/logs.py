"""Logs of two runs, compared: they may differ in the run's identity alone."""

from zo.state.log import read


def same_log(one, other):
    """Whether two files have the same entries, and headers that differ in the run's identity
    alone."""
    (header, entries), (other_header, other_entries) = read(one), read(other)
    return entries == other_entries and {**header, "run": ""} == {**other_header, "run": ""}
