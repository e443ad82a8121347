"""Parts: the same layers for every rank and every replay, and every layer in the end."""

import subprocess
import sys
from collections import Counter

import pytest

from zo.config.schema import EstimatorConfig
from zo.errors import UserError
from zo.method.entry import Entry
from zo.method.part import SHARES, layers_reached, parse
from zo.method.update import sgd


def test_parts_reach_what_they_say():
    assert layers_reached("all", 1, 0, 12) is None
    assert layers_reached("all", 1, 0, 0) is None
    assert layers_reached("top:12", 5, 0, 12) == 12
    assert [layers_reached("auto", 5, 0, layers) for layers in (12, 3, 0)] == [4, 3, None]
    assert layers_reached("top:1", 5, 0, 12) == 1
    assert layers_reached("top:0", 5, 0, 12) == 0


@pytest.mark.parametrize("layers", [1, 3, 8, 30])
def test_sampled_parts_have_the_stated_shares(layers):
    """Within four standard errors of 1500 draws."""
    found = Counter(layers_reached("sampled", step, 7, layers) for step in range(1, 1501))
    expected = Counter()
    for percent, divisor in SHARES:
        expected[None if divisor is None else max(1, layers // divisor)] += percent
    assert sum(expected.values()) == 100
    assert set(found) == set(expected)
    for reached, percent in expected.items():
        share = percent / 100
        assert abs(found[reached] / 1500 - share) <= 4 * (share * (1 - share) / 1500) ** 0.5


def test_a_draw_is_a_function_of_seed_and_step():
    draws = [layers_reached("sampled", step, 7, 16) for step in range(1, 40)]
    assert draws == [layers_reached("sampled", step, 7, 16) for step in range(1, 40)]
    assert draws != [layers_reached("sampled", step, 8, 16) for step in range(1, 40)]


@pytest.mark.parametrize("text", ["foo", "top", "top:", "top:-1", "top:x", "top:1e3", ""])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=r"^estimator\.part=[^\n]* use [^\n]*$"):
        EstimatorConfig(part=text)


def test_a_part_that_a_model_does_not_have_is_refused():
    with pytest.raises(UserError, match="more than the 12 layers of the model; use top:12 or less"):
        layers_reached("top:13", 1, 0, 12)
    for part in ("top:1", "sampled"):
        with pytest.raises(UserError, match=r"have none; use estimator\.part=all"):
            layers_reached(part, 1, 0, 0)


def test_the_rule_keeps_the_part_of_an_entry():
    assert sgd(Entry(1, 16, 0.1, (2.0,), part=5), 0.0).part == 5


def test_a_part_is_read_without_torch():
    look = "import sys, zo.method.part; print({'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
    assert parse("top:3") == ("top", 3)
