"""An audit finds weights that differ from the log's, at a cost that does not grow with the log."""

from pathlib import Path

import pytest
import torch
from conftest import make_llama
from logs import HEADER

from zo.config.schema import MemoryConfig
from zo.distributed.process_group import Mesh
from zo.errors import RankError
from zo.method.entry import Entry
from zo.model.blocks import find_layout
from zo.model.source import ModelSource
from zo.run import audit
from zo.run.audit import HELD, Audit, _judge
from zo.state import replay
from zo.state.log import Log
from zo.streaming.replica import Replica


def started(store, steps=0, **memory):
    model = make_llama()
    memory = MemoryConfig(store=store, **memory)
    log = Log(HEADER, [Entry(i + 1, i + 1, 1e-3, (1.0,)) for i in range(steps)])
    replica = Replica(
        model, find_layout(model), lambda e: ModelSource(model), memory, torch.device("cpu"), Path()
    )
    replica.open(log)
    replica.pass_over()
    return replica, Audit(replica)


def go_on(replica, steps):
    for _ in range(steps):
        number = replica.log.version + 1
        replica.log.append(Entry(number, number, 1e-3, (1.0,)))
        replica.pass_over()


@torch.no_grad()
def replayed_elements(steps, monkeypatch):
    replica, audits = started("host", steps)
    counted, original = [], replay.replay_and_perturb
    costs = []
    for _ in range(3 * HELD):
        monkeypatch.setattr(replay, "replay_and_perturb", original)
        go_on(replica, 2)

        def counting(weights, address, work, *rest, **options):
            counted.append(weights.numel() * len(work.changes))
            original(weights, address, work, *rest, **options)

        counted.clear()
        monkeypatch.setattr(replay, "replay_and_perturb", counting)
        audits.check(Mesh())
        costs.append(sum(counted))
    monkeypatch.setattr(replay, "replay_and_perturb", original)
    replica.close()
    return costs


def test_an_audit_of_a_long_log_replays_no_more_than_one_of_a_short_log(monkeypatch):
    early, late = replayed_elements(10, monkeypatch), replayed_elements(1000, monkeypatch)
    # Where write-backs fall depends on the step's number, nothing else may.
    assert sum(late) < 1.2 * sum(early)
    # A copy waits for HELD audits of two steps, and the stored bytes lag by a few entries.
    assert 0 < max(early + late) <= (2 * HELD + 8) * audit.SAMPLE_BYTES // 4


@pytest.mark.parametrize("store", ["host", "device"])
@torch.no_grad()
def test_a_bit_that_flips_between_audits_is_found(store):
    """One rank alone, whose base cannot be read again: its held copies show it."""
    replica, audits = started(store)
    go_on(replica, 3)
    audits.check(Mesh())
    replica.drain()
    for image in getattr(replica.store, "_images", ()):
        image[:1] ^= 1
    for segments in getattr(replica.store, "segments", ()):
        segments[0][:1] += 1

    def audit_every_copy():
        for _ in range(HELD):
            go_on(replica, 1)
            audits.check(Mesh())

    with pytest.raises(RankError, match=r"after step \d+ the weights of rank 0 \(block "):
        audit_every_copy()
    replica.close()


def test_two_ranks_that_differ_are_both_named_and_neither_is_accused():
    with pytest.raises(
        RankError, match=r"weights of ranks 0 and 1 differ \(block a\), and it is not known which"
    ):
        _judge([(0, "", "x", "a"), (0, "", "y", "a")], 7)


def test_a_majority_names_the_rank_that_is_wrong():
    with pytest.raises(RankError, match=r"weights of rank 2 \(block a\) are not"):
        _judge([(0, "", "x", "a"), (0, "", "x", "a"), (0, "", "y", "a")], 7)
