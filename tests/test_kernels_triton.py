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
from zo.method.perturbation import STORED_DTYPES, Change, Pass, Probe, Z

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


@pytest.mark.slow
def test_the_triton_kernel_has_the_bits_of_the_equation():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", "import test_kernels_triton; test_kernels_triton.compare()"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def specialized(work, dtype, address, count=4096):
    """What Triton's own binder for an sm_90 specialises on: signature and values."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from zo.method.kernels import triton as k

    stored = torch.zeros(count, dtype=dtype)
    out = torch.zeros(max(1, len(work.probes)), count, dtype=dtype) if work.probes else None
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(
        k._replay_and_perturb.signature, k._replay_and_perturb.params, backend
    )
    positional, named = k.arguments(stored, address, work, k._table(work, stored.device, 0), out)
    bound, specialization, options = bind(*positional, **named)
    _, signature, constants, attributes = k._replay_and_perturb._pack_args(
        backend, dict(options), bound, specialization, options
    )
    source = ASTSource(
        fn=k._replay_and_perturb, signature=signature, constexprs=constants, attrs=attributes
    )
    return str(specialization), source, options


def changes(lag, directions):
    coefficients = tuple(float32(1e-3 * (k + 1)) for k in range(directions))
    return tuple(
        Change(step, tuple(range(step, step + directions)), coefficients) for step in range(lag)
    )


def test_nothing_that_changes_within_a_run_compiles_another_variant():
    """A variant takes seconds to compile: a run would stand still the first time that 16 entries
    lag, and again at the first parameter beyond 2**31, and ranks would wait for one that compiles.
    """
    variants = set()
    for lag in (0, 1, 4, 16):
        for directions in (1, 2, 16, 33):
            for probes in (0, 1, 2, 16):
                for address in (0, 128, 2**31, 2**31 + 128, 2**39):
                    work = Pass(
                        1, "rademacher", changes(lag, directions), (Probe(1, 1.0),) * probes
                    )
                    variants.add(specialized(work, torch.bfloat16, address)[0])
    for count in (16, 32, 4096, 100_000):
        variants.add(specialized(Pass(1, "rademacher"), torch.bfloat16, 0, count)[0])
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
    from zo.method.kernels.triton import _table

    device = torch.device("cpu")
    first = _table(Pass(1, "rademacher", changes(3, 2)), device, 0)
    assert _table(Pass(1, "rademacher", changes(3, 2)), device, 0) is first
    assert (
        _table(Pass(1, "rademacher", changes(3, 2)), device, 7) is not None
    )  # of another stream: an upload of its own
    assert not torch.equal(_table(Pass(2, "rademacher", changes(3, 2)), device, 0), first)
    assert _table.cache_info().maxsize is not None


CASES_PTX = [
    pytest.param(
        capability,
        distribution,
        dtype,
        marks=() if capability == 80 and i in (0, 1, 5) else pytest.mark.slow,
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
