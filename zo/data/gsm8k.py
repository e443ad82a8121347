"""GSM8K: word problems whose answers are numbers (Cobbe et al. 2021).

Rows have ``question`` and ``answer``, whose last line is ``#### number``: those of the hub's
``openai/gsm8k``, or of a file of yours.
"""

import re
from typing import Any

TEMPLATE = "{question}\nThink step by step, and end with a line #### and the answer as a number."
NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")


def reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """Return 1 for a completion whose number is the row's, else 0.

    It is the one after ``####``, or the last one where there is no such mark.
    """
    expected = _number(str(row["answer"]).rpartition("####")[2], last=False)
    _, mark, after = completion.partition("####")
    found = _number(after if mark else completion, last=not mark)
    return float(expected is not None and found == expected)


def _number(text: str, last: bool) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1 if last else 0].replace(",", "")) if found else None
