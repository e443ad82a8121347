"""The header of a log, and logs of two runs, compared."""

from zo.state.log import read

HEADER = {
    "directions": 1,
    "seed": 1,
    "distribution": "rademacher",
    "rule": "sgd",
    "weight_decay": 0.0,
}


def same_log(one, other):
    """Whether two files have the same entries, and headers that differ in the run's identity
    alone."""
    (header, entries), (other_header, other_entries) = read(one), read(other)
    return entries == other_entries and {**header, "run": ""} == {**other_header, "run": ""}
