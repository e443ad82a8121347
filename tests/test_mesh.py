"""Law 1: same bits on any mesh."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from logs import same_log
from ranks import lives, server, train

from zo.config.schema import MeshConfig
from zo.distributed.mesh import Shape, fit, idle_report, places
from zo.errors import UserError
from zo.method.table import Grid, owners, share

ROOT = Path(__file__).resolve().parent.parent

Q2 = ["estimator.directions=2", "model.dtype=bfloat16", "update.weight_decay=0.1"]
MESHES = [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 4), (4, 1, 2)]


@pytest.mark.parametrize(
    "extra", [["estimator.directions=1"], ["estimator.directions=3", "model.dtype=bfloat16"]]
)
@pytest.mark.slow
def test_same_bits_on_any_mesh(overrides, tmp_path, extra):
    """Log, weights, scores: nothing may depend on who computed a cell."""
    alone = train([*overrides, *extra, f"run.dir={tmp_path}/alone"])
    for perturb, data in ((2, 1), (1, 2), (2, 2)):
        folder = tmp_path / f"{perturb}x{data}"
        mesh = [f"mesh.perturb={perturb}", f"mesh.data={data}", f"run.dir={folder}"]
        found = train([*overrides, *extra, *mesh], ranks=perturb * data)
        assert found["fingerprint"] == alone["fingerprint"]
        assert found["eval"] == alone["eval"]
        assert found["loss"] == alone["loss"]
        assert same_log(folder / "steps.log", tmp_path / "alone" / "steps.log")


DIAGONAL = ["estimator.cover=diagonal", "estimator.directions=null", "batch.micro=1"]


@pytest.mark.parametrize(
    "extra", [["estimator.probes=2"], ["estimator.name=one-sided", "model.dtype=bfloat16"]]
)
@pytest.mark.slow
def test_same_bits_on_any_mesh_where_each_micro_batch_has_its_own_directions(
    overrides, tmp_path, extra
):
    settings = [*overrides, *DIAGONAL, *extra, "update.clip=1.0"]
    alone = train([*settings, f"run.dir={tmp_path}/alone"])
    sliced = ["memory.store=host", "mesh.slice=2"]
    for perturb, data, more in ((2, 1, []), (1, 2, sliced), (2, 2, [])):
        folder = tmp_path / f"{perturb}x{data}"
        mesh = [f"mesh.perturb={perturb}", f"mesh.data={data}", f"run.dir={folder}", *more]
        found = train([*settings, *mesh], ranks=perturb * data)
        assert found["fingerprint"] == alone["fingerprint"]
        assert found["eval"] == alone["eval"]
        assert found["loss"] == alone["loss"]
        assert same_log(folder / "steps.log", tmp_path / "alone" / "steps.log")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and summary of one process with two directions, once for all."""
    return tmp_path_factory.mktemp("alone") / "run", {}


@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
@pytest.mark.slow
def test_same_bits_whoever_keeps_a_slice(overrides, alone, tmp_path, mesh, store):
    """The folder of weights too: rank 0 writes it while the others serve their slices."""
    whole, expected = alone
    if not expected:
        expected |= train([*overrides, *Q2, f"run.dir={whole}", "export.at_end=true"])
    perturb, data, slices = mesh
    unit = "module" if slices == 2 else "layer"
    where = [
        f"memory.store={store}",
        f"memory.unit={unit}",
        f"run.dir={tmp_path}/run",
        "run.snapshot_every=3",
    ]
    shape = [
        f"mesh.perturb={perturb}",
        f"mesh.data={data}",
        f"mesh.slice={slices}",
        "export.at_end=true",
    ]
    found = train([*overrides, *Q2, *where, *shape], ranks=perturb * data)
    assert found["fingerprint"] == expected["fingerprint"]
    assert found["eval"] == expected["eval"]
    assert same_log(tmp_path / "run" / "steps.log", whole / "steps.log")
    folders = [path / "model" / "model.safetensors" for path in (tmp_path / "run", whole)]
    assert folders[0].read_bytes() == folders[1].read_bytes()


@pytest.mark.slow
def test_a_rank_without_a_cell_serves_its_slice(overrides, alone, tmp_path):
    """Four ranks for a table of two cells, in slices of four."""
    settings = [*overrides, "batch.micro=4"]
    expected = train([*settings, f"run.dir={tmp_path}/alone"])
    sliced = ["memory.store=host", "mesh.slice=4", f"run.dir={tmp_path}/run"]
    assert train([*settings, *sliced], ranks=4)["fingerprint"] == expected["fingerprint"]


@pytest.mark.slow
def test_a_slice_is_what_a_rank_reads_and_the_scalars_are_few(overrides, tmp_path):
    settings = [*overrides, "memory.store=host", "eval.every=0", "run.steps=6"]
    moved = {}
    for slices in (1, 2):
        folder = tmp_path / str(slices)
        train([*settings, f"mesh.slice={slices}", f"run.dir={folder}"], ranks=2)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        moved[slices] = [
            sum(step[key] for step in steps[1:]) for key in ("read_bytes", "gathered_bytes")
        ]
        assert all(0 < step["scalar_bytes"] < 1000 for step in steps)
    whole, gathered = moved[1][0], moved[2][1]
    assert moved[1][1] == 0
    # Slices are whole pages, so of a tiny block one rank has more than half.
    assert 0.4 * whole < moved[2][0] < 0.7 * whole
    assert 0.4 * whole < gathered < 0.7 * whole


@pytest.mark.slow
def test_an_uneven_table_is_shared_whole(overrides, tmp_path):
    """Three ranks on two rows or four columns: no cell is lost or done twice."""
    extra = ["estimator.name=one-sided", "estimator.directions=2", "batch.micro=1"]
    alone = train([*overrides, *extra, f"run.dir={tmp_path}/alone"])
    for mesh in (["mesh.perturb=3"], ["mesh.data=3"]):
        found = train([*overrides, *extra, *mesh, f"run.dir={tmp_path}/{mesh[0][5:9]}"], ranks=3)
        assert found["fingerprint"] == alone["fingerprint"]


def test_shares_cover_every_line_once():
    for lines in range(1, 20):
        for axis in range(1, 8):
            shares = [share(lines, axis, i) for i in range(axis)]
            assert [line for s in shares for line in s] == list(range(lines))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_cells_are_balanced_on_any_mesh(rows, columns):
    for perturb in range(1, 5):
        for data in range(1, 4):
            of_cells = owners(rows, columns, perturb, data)
            counts = [of_cells.count(rank) for rank in range(perturb * data)]
            assert sum(counts) == rows * columns == len(of_cells)
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("config", "ranks", "rows", "columns", "expected"),
    [
        (MeshConfig(), 1, 2, 2, Shape(1, 1)),
        (MeshConfig(), 2, 2, 2, Shape(2, 1)),
        (MeshConfig(), 4, 2, 2, Shape(2, 2)),
        (MeshConfig(), 4, 8, 1, Shape(4, 1)),
        (MeshConfig(), 3, 2, 3, Shape(1, 3)),
        (MeshConfig(data=2), 2, 2, 2, Shape(1, 2)),
        (MeshConfig(slice=4), 4, 2, 1, Shape(4, 1, 4)),
    ],
)
def test_an_empty_mesh_is_filled_in(config, ranks, rows, columns, expected):
    assert fit(config, ranks, Grid(rows, columns)) == expected


@pytest.mark.parametrize(
    ("config", "ranks"),
    [(MeshConfig(perturb=3), 1), (MeshConfig(perturb=2, data=2), 2), (MeshConfig(), 5)],
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_would(config, ranks):
    with pytest.raises(UserError, match=r"use mesh.perturb=\d mesh.data=\d|start at most 4 ranks"):
        fit(config, ranks, Grid(2, 2))


def test_slices_do_not_reach_over_nodes():
    with pytest.raises(
        UserError, match=r"mesh.slice=4 does not divide the 2 ranks of a node.*use 1, 2$"
    ):
        fit(MeshConfig(slice=4), 4, Grid(4, 1), local_ranks=2)


def test_slices_of_a_device_store_are_refused(overrides, tmp_path):
    said = lives([*overrides, "mesh.slice=2", f"run.dir={tmp_path}/run"], ranks=2)
    assert all(
        "mesh.slice=2 cuts weights" in text and "memory.store=host or disk" in text for text in said
    )
    assert not (tmp_path / "run").exists()


def keep_slice(index, of, found):
    """One rank's slice of a host store, and the memory that making it took."""
    from transformers import OPTConfig, OPTForCausalLM

    from zo.io.host_memory import return_freed_memory, return_memory_at_once
    from zo.model.blocks import find_layout
    from zo.model.layout import Slice
    from zo.model.source import RandomSource
    from zo.streaming.stores import HostStore

    return_memory_at_once()
    sizes = {
        "hidden_size": 512,
        "ffn_dim": 2048,
        "word_embed_proj_dim": 512,
        "num_attention_heads": 8,
    }
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=24, vocab_size=8192))
    layout = find_layout(model, "layer")
    total = sum(block.size_bytes for block in layout.blocks)
    return_freed_memory()
    before = held_bytes()
    store = HostStore(layout, RandomSource(model, 0), slice=Slice(index, of))
    found.put((store.found.digests.numpy(), held_bytes() - before, total))


def barrier_and_count(rank, port, found):
    """Meet, wait in a barrier for rank 0, which is late, and count requests to the store."""
    from zo.distributed.process_group import Mesh

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    mesh, requested = Mesh(timeout_s=60), [0]

    class Counted:
        """A store that counts the keys of its requests."""

        def __getattr__(self, name):
            method = getattr(store, name)

            def call(keys, *arguments):
                requested[0] += len(keys) if isinstance(keys, list) else 1
                return method(keys, *arguments)

            return call

    store, mesh._store = mesh._store, Counted()
    if rank == 0:
        time.sleep(LATE_S)
    begun = time.monotonic()
    mesh.barrier()
    waited = time.monotonic() - begun
    mesh.barrier()
    mesh.close()
    found.put((rank, waited, requested[0]))


LATE_S = 4


@pytest.mark.slow
def test_a_barrier_waits_for_all_with_few_requests():
    """One rank may write a large model for an hour, while the others share its host and store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = server()
    found = context.Queue()
    processes = [context.Process(target=barrier_and_count, args=(i, port, found)) for i in range(4)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for rank, waited, requested in results:
        assert rank == 0 or waited > LATE_S / 2
        assert requested < 60


def held_bytes():
    with open(f"/proc/{os.getpid()}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.slow
def test_four_ranks_hold_one_copy_together():
    """Each process's own memory, as the system counts it."""
    context = server()
    found = context.Queue()
    processes = [context.Process(target=keep_slice, args=(i, 4, found)) for i in range(4)]
    for process in processes:
        process.start()
    results = [found.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    # Every leaf was hashed by one of them.
    assert (sum((digests != 0).any(1).astype(int) for digests, _, _ in results) == 1).all()
    total = results[0][2]
    assert total > 250e6
    assert 0.9 * total < sum(held for _, held, _ in results) < 1.1 * total


SPSA, ONE_SIDED = (lambda q: 2 * q), (lambda q: q + 1)


@pytest.mark.parametrize("rows_of", [SPSA, ONE_SIDED])
@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize(("sequences", "micro"), [(16, 16), (16, 8), (12, 3), (7, 7), (8, 1)])
def test_idle_ranks_are_counted_and_the_remedy_fills_them(rows_of, ranks, sequences, micro):
    """Every number in the line is tried: a remedy must not leave a rank idle."""
    for directions in (1, 2, 3):
        for perturb in (p for p in range(1, ranks + 1) if ranks % p == 0):
            shape = Shape(perturb, ranks // perturb, ranks)
            of_cells = owners(rows_of(directions), sequences // micro, perturb, shape.data)
            counts = {of_cells.count(rank) for rank in range(ranks)}
            said = idle_report(shape, rows_of, directions, sequences, micro)
            if len(counts) == 1:
                assert said is None
                continue
            idle = sum(rank not in of_cells for rank in range(ranks))
            if idle:
                assert said.startswith(f"{idle} of {ranks} ranks ha")
            else:
                assert said.startswith(f"ranks have {min(counts)} or {max(counts)} cells each")
            remedies = re.findall(
                r"(batch\.micro|estimator\.directions)=(\d+) \((\d+) cells\)", said
            )
            assert remedies
            for key, value, cells in remedies:
                q, m = (
                    (int(value), micro)
                    if key == "estimator.directions"
                    else (directions, int(value))
                )
                assert sequences % m == 0
                assert rows_of(q) * (sequences // m) == int(cells)
                assert idle_report(shape, rows_of, q, sequences, m) is None


def test_idle_ranks_of_a_large_recipe_by_name():
    said = idle_report(Shape(2, 4, 8), SPSA, 1, 16, 16)
    assert said == (
        "6 of 8 ranks have no cell: the loss table has 2 rows (probes) x 1 column (micro-batches) "
        "for 8 ranks; batch.micro=4 (8 cells) or estimator.directions=4 (8 cells) gives all ranks "
        "the same number (it changes the result, so use a new run.dir)"
    )


@pytest.mark.slow
def test_a_run_says_once_that_ranks_have_no_cell(overrides, tmp_path):
    """As a user reads it: on stderr, from rank 0 alone."""
    settings = [
        *overrides,
        "batch.micro=4",
        "memory.store=host",
        "mesh.slice=4",
        "run.steps=2",
        "eval.every=0",
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--standalone",
    ]
    done = subprocess.run(
        [*launcher, "launch/train.py", *settings, f"run.dir={tmp_path}/run"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PET_LOCAL_ADDR": "localhost"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count(
            "2 of 4 ranks have no cell: the loss table has 2 rows (probes) x 1 column"
        )
        == 1
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_values_are_found_again_in_what_ranks_gathered(ranks):
    """Against a plain simulation: each rank sends its values in order, padded, and a flag."""
    for of_cells in ([i % ranks for i in range(7)], [0] * 5, [ranks - 1, 0, 0], []):
        sent = [[i for i, owner in enumerate(of_cells) if owner == rank] for rank in range(ranks)]
        most, at = places(tuple(of_cells), ranks)
        assert most == max(map(len, sent))
        gathered = [value for row in sent for value in [*row, *[None] * (most + 1 - len(row))]]
        assert [gathered[i] for i in at] == list(range(len(of_cells)))


def test_values_of_a_large_run_are_placed_in_one_pass():
    """A search for each rank's values would compare every rank with every value: 32 million."""

    class Counted(int):
        comparisons = 0
        __hash__ = int.__hash__

        def __eq__(self, other):
            Counted.comparisons += 1
            return int(self) == int(other)

    of_cells = tuple(Counted(rank) for rank in owners(2000, 2, 2000, 2) + owners(2, 2000, 2, 1000))
    most, at = places.__wrapped__(of_cells, 4000)
    assert most == 3
    assert len(set(at)) == len(of_cells) == 8000
    assert Counted.comparisons < 10 * len(of_cells)
