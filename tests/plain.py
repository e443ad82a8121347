"""The plainest run: one dense direction a step that every micro-batch sees."""

from zo import load_config

PLAIN = [
    "batch.sequences=16",
    "batch.micro=8",
    "batch.max_tokens=128",
    "batch.fold=null",
    "estimator.name=spsa",
    "estimator.directions=null",
    "estimator.distribution=rademacher",
    "estimator.cover=full",
    "estimator.probes=1",
    "estimator.part=all",
    "estimator.eps=1e-3",
    "update.lr=1.5e-4",
    "update.clip=null",
    "update.schedule=linear",
    "run.trackers=[]",
]


def plain_config(overrides=()):
    """Return the configuration of the plainest run with overrides."""
    return load_config("quickstart", [*PLAIN, *overrides])
