"""Projected gradients in bfloat16 against float32, of the quickstart's model and recipe.

    python benchmarks/gradients.py [key=value ...]

Both runs take one step from the same weights (bfloat16 ones, widened) on the same data along the
same directions. Prints the slope of the regression of bfloat16's on float32's, their correlation,
and the root mean square of both.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo.io.quickstart import model_folder
from zo.state.log import read

ROOT = Path(__file__).resolve().parent.parent


def scalars(model, dtype, keys, scratch):
    """Return the projected gradients of one step that moves nothing."""
    run = scratch / f"run-{dtype}"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *keys]
    command += [f"model.name={model}", f"model.dtype={dtype}", "run.steps=1", "update.lr=0"]
    command += ["update.clip=null", "eval.every=0", "export.at_end=false", f"run.dir={run}"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return torch.tensor(read(run / "steps.log")[1][0].scalars, dtype=torch.float64)


def main():
    with tempfile.TemporaryDirectory() as folder:
        scratch, name = Path(folder), model_folder("smollm2-135m-instruct")
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        found = {}
        for dtype in ("bfloat16", "float32"):
            model.to(getattr(torch, dtype)).save_pretrained(scratch / dtype)
            tokenizer.save_pretrained(scratch / dtype)
            found[dtype] = scalars(scratch / dtype, dtype, sys.argv[1:], scratch)
        low, exact = found["bfloat16"], found["float32"]
        print(
            json.dumps(
                {
                    "directions": len(exact),
                    "slope": round(float(low @ exact / (exact @ exact)), 4),
                    "correlation": round(float(torch.corrcoef(torch.stack((low, exact)))[0, 1]), 4),
                    "rms_bfloat16": round(float(low.square().mean().sqrt()), 3),
                    "rms_float32": round(float(exact.square().mean().sqrt()), 3),
                }
            )
        )


if __name__ == "__main__":
    main()
