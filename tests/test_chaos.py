"""Law 2, under torchrun: a run with a kill -9 ends with the bits of an undisturbed one."""

import fates
import pytest
from logs import same_log
from ranks import train

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.


@pytest.mark.parametrize("seed", [1, 4])
def test_a_run_ends_with_the_same_bits_whoever_dies(overrides, tmp_path, seed):
    """``benchmarks/chaos.py`` does this 30 times."""
    settings = [*overrides, "model.dtype=bfloat16", "eval.every=0"]
    expected = train([*settings, f"run.steps={fates.STEPS}", f"run.dir={tmp_path}/alone"])
    drawn, summary, restarted = fates.run(settings, tmp_path / "run", seed)
    assert summary["fingerprint"] == expected["fingerprint"], drawn
    assert same_log(tmp_path / "run" / "steps.log", tmp_path / "alone" / "steps.log")
    assert restarted, drawn
