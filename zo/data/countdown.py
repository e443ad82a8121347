"""Countdown: make a number from three or four others by + - * /, each used once.

Rows are a function of a seed, so that the task needs no download; every target can be reached.
"""

import ast
import operator
import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from zo.data.files import Row

ROWS, SEED = 4096, 0
LARGEST_NUMBER, LARGEST_TARGET = 99, 999
TEMPLATE = (
    "Make {target} from the numbers {numbers}: use each of them once, and only + - * / and "
    "brackets. Think first, then write the expression as <answer>expression</answer>, for example "
    "<answer>(7 - 2) * 5</answer>."
)
FORM, NUMBERS, RIGHT = 0.1, 0.2, 1.0
"""Rewards of an answer that is an expression, that uses the numbers, and that is right."""
LONGEST = 200
"""Characters of an expression, at most."""
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def rows() -> list[Row]:
    """Return rows with ``numbers`` and ``target``."""
    chance, found = random.Random(SEED), list[Row]()
    while len(found) < ROWS:
        numbers = [chance.randint(1, LARGEST_NUMBER) for _ in range(chance.choice((3, 4)))]
        target = _reach(numbers, chance)
        if target.denominator == 1 and 0 < target <= LARGEST_TARGET:
            found.append({"numbers": numbers, "target": int(target)})
    return found


def _reach(numbers: list[int], chance: random.Random) -> Fraction:
    """Return the value of an expression of the numbers, in another order."""
    left = [Fraction(n) for n in chance.sample(numbers, len(numbers))]
    while len(left) > 1:
        at = chance.randrange(len(left) - 1)
        one, other = left[at : at + 2]
        operate = chance.choice([*OPERATORS.values()])
        if operate is operator.truediv and (other == 0 or (one / other).denominator > 1):
            operate = operator.add
        left[at : at + 2] = [operate(one, other)]
    return left[0]


def reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """Return ``RIGHT`` for an answer that is right, less for its form and its numbers alone.

    The answer is what stands last between ``<answer>`` and ``</answer>``; a prompt may end with the
    first.
    """
    opened = "<answer>" if prompt.rstrip().endswith("<answer>") else ""
    answers = re.findall(r"<answer>([^<>]*)</answer>", opened + completion)
    try:
        value, used = _value(answers[-1].strip() if answers else "")
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return 0.0
    if sorted(used) != sorted(row["numbers"]):
        return FORM
    return RIGHT if value == row["target"] else NUMBERS


def _value(expression: str) -> tuple[Fraction | None, list[int]]:
    """Return the value of an expression, ``None`` if it divides by zero, and its numbers.

    Raises:
        ValueError: it is not of whole numbers, + - * / and brackets alone.
    """
    if not expression or len(expression) > LONGEST:
        raise ValueError(expression)
    used: list[int] = []

    def evaluate(node: ast.AST) -> Fraction | None:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            one, other = evaluate(node.left), evaluate(node.right)
            if one is None or other is None or (isinstance(node.op, ast.Div) and other == 0):
                return None
            return OPERATORS[type(node.op)](one, other)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError(expression)

    return evaluate(ast.parse(expression, mode="eval").body), used
