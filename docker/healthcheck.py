#!/usr/bin/env python3
"""Train a tiny model for two steps, without network: docker/healthcheck.py [key=value ...].

Exit code 0 if both steps were taken. Runs on CPU, beside other work; ``run.device=cuda`` tests the
GPU, and ``memory.store=disk memory.disk_engine=deepnvme`` DeepSpeed's engine, which aborts or hangs
where the container's seccomp profile refuses the system call io_pgetevents (remedy:
``--security-opt seccomp=unconfined``).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2
LIMIT_S = 240

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
"""A configuration; weights and data are random."""


def main(overrides: list[str]) -> int:
    """Train, and check the summary."""
    with tempfile.TemporaryDirectory() as scrap:
        (Path(scrap) / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        command = [sys.executable, "launch/train.py", f"model.name={scrap}", "model.weights=random"]
        command += [
            "recipe=quickstart",
            "data.name=synthetic",
            "batch.sequences=2",
            "batch.micro=1",
            "batch.max_tokens=16",
            "estimator.part=all",
        ]
        command += [
            f"run.steps={STEPS}",
            f"run.dir={scrap}/run",
            "eval.every=0",
            "export.at_end=false",
        ]
        command += [] if any(o.startswith("run.device=") for o in overrides) else ["run.device=cpu"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command + overrides,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                timeout=LIMIT_S,
                check=True,
            )
        except subprocess.SubprocessError as error:
            print(f"unhealthy: {error}", file=sys.stderr)
            return 1
    summary = json.loads(done.stdout.splitlines()[-1])
    print(f"healthy: {summary['steps']} steps in {summary['train_s']} s")
    return 0 if summary["steps"] == STEPS else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
