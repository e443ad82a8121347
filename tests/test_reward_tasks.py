"""Countdown and GSM8K: what their rewards accept, and rows that can be solved."""

import itertools
from fractions import Fraction

import pytest

from zo.data import countdown, gsm8k

ROW = {"numbers": [3, 5, 7], "target": 22}


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("First 15, then <answer>3 * 5 + 7</answer>", 1.0),
        ("<answer>1</answer> or <answer> (7+5*3) </answer> done", 1.0),
        ("<answer>3 + 5 + 7</answer>", 0.2),
        ("<answer>3 * 5 + 7 / 0</answer>", 0.1),
        ("<answer>22</answer>", 0.1),
        ("<answer>3 + 5 + 7 = 22</answer>", 0.0),
        ("<answer>9**9**9**9</answer>", 0.0),
        ("<answer>__import__('os')</answer>", 0.0),
        ("<answer>" + "(" * 150 + "</answer>", 0.0),
        ("3 * 5 + 7", 0.0),
        ("<answer>3 * 5 + 7", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_rewards_form_numbers_and_value(completion, reward):
    assert countdown.reward("Make 22.", completion, ROW) == reward


def test_a_prompt_may_open_the_answer():
    assert countdown.reward("22: <answer>", "3 * 5 + 7</answer>", ROW) == 1.0


def reachable(numbers):
    """Return all values of expressions of some numbers."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        one, other = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        values = {one + other, one - other, one * other} | ({one / other} if other else set())
        found |= set().union(*(reachable([value, *rest]) for value in values))
    return found


def test_countdown_rows_are_the_same_each_time_and_can_be_solved():
    rows = countdown.rows()
    assert rows == countdown.rows() and len(rows) == countdown.ROWS
    assert {len(row["numbers"]) for row in rows} == {3, 4}
    for row in rows[:10]:
        assert row["target"] in reachable([Fraction(n) for n in row["numbers"]]), row


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("2 and 3 make 5.\n#### 1,050", 1.0),
        ("#### $1050.00 in all, not 7", 1.0),
        ("The answer is 1050", 1.0),
        ("1050 or 9", 0.0),
        ("#### none", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_rewards_the_number(completion, reward):
    row = {"question": "?", "answer": "First <<1+1=2>>2.\n#### 1,050"}
    assert gsm8k.reward("", completion, row) == reward
