"""Whatever the bytes are that a reader is given, it reads them or refuses them in one line."""

import damage
import malformed
import pytest
from hypothesis import HealthCheck, given, settings


@pytest.mark.parametrize("name", malformed.TARGETS)
def test_any_input_is_read_or_refused(name):
    read, inputs, count = malformed.TARGETS[name]

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def each(value):
        damage.feed(read, value)

    each()


def test_ten_thousand_inputs_are_fed():
    assert sum(count for _, _, count in malformed.TARGETS.values()) == 10_000
