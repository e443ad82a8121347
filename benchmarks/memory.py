"""Resident memory of a training step over the weights, against its bound: two blocks of scratch and the activations.

    python benchmarks/memory.py [--shape 1x32] [--dtype float32]

The model is OPT-125M's shape with random weights. Peaks are the kernel's own (VmHWM, reset before each part).
"""

import argparse
import json

import torch
from step_time import Zo, forwards
from transformers import OPTConfig, OPTForCausalLM

from zo.method.kernels import visit
from zo.method.perturbation import Change, Pass, Probe

MIB = 2**20


def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_over_now(run):
    """Bytes by which a call raises the peak above what is resident before it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1x32")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig()).to(getattr(torch, arguments.dtype)).eval()
    ids = torch.randint(4, 50000, tuple(map(int, arguments.shape.split("x"))))
    with torch.no_grad():
        forwards(model, ids)
        activations = peak_over_now(lambda: forwards(model, ids))
        # Loads numba and the compiled kernel: a constant of the process, reported apart.
        before = resident("VmRSS")
        tiny = torch.zeros(2, 1 << 18, dtype=model.dtype)
        visit(
            tiny[0],
            0,
            Pass(1, "rademacher", (Change(1, (0,), (1.0,)),), (Probe(1, 1.0),)),
            tiny[1:],
        )
        kernel = resident("VmRSS") - before
        before = resident("VmRSS")
        zo = Zo(model, "rademacher")
        training = (
            resident("VmRSS") - before + peak_over_now(lambda: [zo.step(ids) for _ in range(4)])
        )
    blocks = zo.model.layout.blocks
    scratch = 2 * max(b.size_bytes for b in blocks)
    sizes = {
        "weights": sum(b.size_bytes for b in blocks),
        "kernel_constant": kernel,
        "step_over_weights": training,
        "two_blocks_and_activations": scratch + activations,
        "two_blocks": scratch,
        "activations": activations,
    }
    mib = {f"{name}_mib": round(size / MIB, 1) for name, size in sizes.items()}
    print(json.dumps({"shape": arguments.shape, "dtype": arguments.dtype, **mib}))


if __name__ == "__main__":
    main()
