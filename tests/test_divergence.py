"""A run that diverges is told from noise."""

import math

import pytest

from zo.observe.divergence import Divergence


def first_alarm(seen, **settings):
    guard = Divergence(**settings)
    return next((step for step, loss in enumerate(seen, 1) if guard.add(loss)), None)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([10.5, 10.4, 10.6, 10.5, 12.0, 20.0, 30.0, 40.0, 60.0], 8),
        ([0.6, 0.9, 0.4, 0.7, 1.1, 1.0, 0.3, 1.2] * 20, None),
        ([3.0] * 4 + [10.8] * 4, 8),
        ([6.0] * 4 + [10.5] * 4, None),
        ([6.0] * 4 + [10.7] * 4, 8),
        ([10.83] * 4 + [10.9] * 20, None),
        ([0.05] * 4 + [0.15] * 20, None),
        ([2.0] * 4 + [math.nan, math.inf] * 8 + [9.0] * 4, 24),
    ],
)
def test_a_rise_of_the_loss_is_seen_and_noise_is_not(losses, step):
    assert first_alarm(losses, uniform=math.log(50272)) == step


def test_losses_of_an_earlier_process_count():
    assert first_alarm([9.0], losses=[2.0] * 4 + [9.0] * 3) == 1
    assert first_alarm([9.0] * 20) is None
