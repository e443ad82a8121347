"""The Triton kernel against the equation, bit for bit, in Triton's interpreter.

The interpreter is chosen when Triton is imported, so the comparison runs in a process of its own.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from test_perturbation import bits

from zo.method.estimator import float32
from zo.method.perturbation import STORED_DTYPES, Change, Matrices, Pass, Probe, Z

pytest.importorskip("triton", reason="Triton is not installed on this platform")

CASES = [
    (distribution, dtype, count, address)
    for distribution in ("rademacher", "gaussian")
    for dtype in ("float32", "bfloat16", "float16")
    for count, address in ((5_000, 128_000), (2_048, 2**39 + 128))
]


def compare():
    """Run every case; called in the process with the interpreter."""
    import torch
    from test_perturbation import CHANGES, PROBES, weights

    from zo.method.kernels.triton import replay_and_perturb_triton
    from zo.method.perturbation import Pass, replay_and_perturb_reference

    for seed in (3, 2**64 - 1):
        for distribution, name, count, address in CASES:
            dtype = getattr(torch, name)
            expected, found = weights(count, dtype), weights(count, dtype)
            expected_out, found_out = (
                torch.zeros(4, count, dtype=dtype),
                torch.zeros(4, count, dtype=dtype),
            )
            replay_and_perturb_reference(
                expected, address, Pass(seed, distribution, CHANGES, PROBES), expected_out
            )
            replay_and_perturb_triton(
                found, address, Pass(seed, distribution, CHANGES, PROBES), found_out
            )
            assert torch.equal(bits(found), bits(expected)), (distribution, name, count, "weights")
            assert torch.equal(bits(found_out), bits(expected_out)), (
                distribution,
                name,
                count,
                "probes",
            )
            replay_and_perturb_triton(found, address, Pass(seed, distribution, CHANGES))
            replay_and_perturb_reference(expected, address, Pass(seed, distribution, CHANGES))
            assert torch.equal(bits(found), bits(expected)), (
                distribution,
                name,
                count,
                "replay alone",
            )


RANK_ONE_CASES = [
    ("float32", ((2, 2500),), ()),
    ("float32", ((5, 77), (40, 3)), ("five", "zeros")),
    ("bfloat16", ((3, 31, 40), (1, 1)), ("zeros", "three")),
    ("float16", ((5, 77), (40, 3)), ("five", "zeros")),
]


def compare_rank_one():
    """Run every case; called in the process with the interpreter."""
    import torch
    from test_perturbation import SEED, weights
    from test_rank_one import CHANGES, PROBES, START, placed

    from zo.method.kernels import triton_rank_one
    from zo.method.kernels.triton import replay_and_perturb_triton
    from zo.method.kernels.triton_factors import factor_signs_triton
    from zo.method.perturbation import factor_signs_reference, replay_and_perturb_reference
    from zo.method.philox import Purpose

    def replayed(function):
        stored = weights(count, dtype)
        stored[::7] = -0.0
        out = torch.zeros(len(PROBES), count - 128, dtype=dtype)
        function(stored[128:], START + 128, work, out, None, matrices)
        return torch.cat((bits(stored), bits(out).reshape(-1)))

    for name, shapes, changes in RANK_ONE_CASES:
        matrices, count = placed(*shapes)
        made = tuple(one for key in changes for one in CHANGES[key])
        work, dtype = Pass(SEED, "rank-one", made, PROBES), getattr(torch, name)
        expected = replayed(replay_and_perturb_reference)
        for most_words in (1 << 24, 1)[: len(made)]:  # one launch for all changes, and one each
            triton_rank_one.MOST_WORDS = most_words
            assert torch.equal(replayed(replay_and_perturb_triton), expected), (name, shapes)
        for start, number in ((START, 3000), (START + 77, 5)):
            stream = SEED, [3, 2**32 - 1], start, number, Purpose.COLUMN, dtype
            assert torch.equal(factor_signs_triton(*stream, "cpu"), factor_signs_reference(*stream))


@pytest.mark.slow
@pytest.mark.parametrize("compared", ["compare", "compare_rank_one"])
def test_the_triton_kernel_has_the_bits_of_the_equation(compared):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    command = [
        sys.executable,
        "-c",
        f"import test_kernels_triton; test_kernels_triton.{compared}()",
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def specialized(work, dtype, address, count=4096):
    """What Triton's own binder for an sm_90 specialises on: signature and values."""
    from zo.method.kernels import triton as k
    from zo.method.kernels import triton_rank_one as rank_one
    from zo.method.kernels.triton_common import VECTOR, table_of

    stored = torch.zeros(count, dtype=dtype)
    out = torch.zeros(max(1, len(work.probes)), count, dtype=dtype) if work.probes else None
    usual = (stored, address, work, table_of(work, stored.device, 0), out)
    if work.distribution != "rank-one":
        return bound(k._replay_and_perturb, *k.arguments(*usual))
    matrices = (Matrices(address, count, 1, count),)
    unit = VECTOR if count % VECTOR == 0 else 1
    cut = rank_one.cut_of(address, count, matrices, unit, stored.device, 0)
    factors = torch.zeros(1, cut.length, dtype=torch.int32)
    return bound(rank_one._replay_and_perturb, *rank_one.arguments(*usual, cut, factors))


def bound(kernel, positional, named):
    """What Triton's own binder for an sm_90 specialises a kernel on, its source and options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialization, options = bind(*positional, **named)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(options), values, specialization, options
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return str(specialization), source, options


def changes(lag, directions):
    coefficients = tuple(float32(1e-3 * (k + 1)) for k in range(directions))
    return tuple(
        Change(step, tuple(range(step, step + directions)), coefficients) for step in range(lag)
    )


@pytest.mark.parametrize("distribution", ["rademacher", "rank-one"])
def test_nothing_that_changes_within_a_run_compiles_another_variant(distribution):
    """A variant takes seconds to compile: a run would stand still the first time that 16 entries
    lag, and again at the first parameter beyond 2**31, and ranks would wait for one that compiles.
    """
    variants = set()
    for lag in (0, 1, 4, 16):
        for directions in (1, 2, 16, 33):
            for probes in (0, 1, 2, 16):
                for address in (0, 128, 2**31, 2**31 + 128, 2**39):
                    work = Pass(
                        1, distribution, changes(lag, directions), (Probe(1, 1.0),) * probes
                    )
                    variants.add(specialized(work, torch.bfloat16, address)[0])
    for count in (16, 32, 4096, 100_000):
        variants.add(specialized(Pass(1, distribution), torch.bfloat16, 0, count)[0])
    assert len(variants) == 1, variants


def test_a_segment_of_any_size_needs_one_more_variant():
    whole, ragged, one, odd = (
        specialized(Pass(1, "rademacher"), torch.float32, 0, count)[0]
        for count in (4096, 4097, 1, 777)
    )
    assert len({ragged, one, odd}) == 1
    assert whole != ragged


def test_one_table_serves_all_segments_of_a_pass():
    """Else each of hundreds of segments costs a list, a tensor, a locked buffer and a copy."""
    from zo.method.kernels.triton_common import table_of

    device = torch.device("cpu")
    first = table_of(Pass(1, "rademacher", changes(3, 2)), device, 0)
    assert table_of(Pass(1, "rademacher", changes(3, 2)), device, 0) is first
    assert (
        table_of(Pass(1, "rademacher", changes(3, 2)), device, 7) is not None
    )  # of another stream: an upload of its own
    assert not torch.equal(table_of(Pass(2, "rademacher", changes(3, 2)), device, 0), first)
    assert table_of.cache_info().maxsize is not None


CASES_PTX = [
    pytest.param(
        capability,
        distribution,
        dtype,
        marks=() if capability == 80 and i in (0, 1, 5, 7) else pytest.mark.slow,
        id=f"sm_{capability}-{distribution}-{str(dtype)[6:]}",
    )
    for capability in (80, 90, 100)
    for i, (distribution, dtype) in enumerate((z, t) for z in Z for t in STORED_DTYPES)
]


@pytest.mark.parametrize(("capability", "distribution", "dtype"), CASES_PTX)
def test_compiled_code_neither_contracts_nor_flushes(capability, distribution, dtype):
    """A CPU rounds after each multiplication and keeps subnormals. A GPU that contracts
    ``a * b + c`` (``fma``) rounds once, and one that flushes (``.ftz``) turns float16's subnormals,
    which pass through float32's, into zero: weights of a GPU run would differ from a CPU run's, and
    a run that changes machines would fork. Compiling needs no GPU.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    work = Pass(1, distribution, changes(2, 2), (Probe(1, 1.0), Probe(1, -1.0)))
    _, source, options = specialized(work, dtype, 2**31)
    ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options)).asm[
        "ptx"
    ]
    assert f".target sm_{capability}" in ptx
    assert re.search(
        r"\bmul\.(rn\.)?f32(x2)?\b", ptx
    )  # the pattern below is looked for in code that computes
    assert not re.findall(r"\bfma\.\S+|\bmad\.\S*f32|\S+\.ftz\S*|\S+\.approx\S*", ptx)
