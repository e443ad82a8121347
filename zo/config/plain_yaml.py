"""Read YAML of texts, numbers, lists and groups: what a run or a recipe writes, and nothing else.

PyYAML's safe loader makes no objects, but a file of some hundred bytes whose aliases name one
another unfolds to gigabytes, so that aliases are refused; and so are dates, sets, bytes, numbers of
thousands of digits and groups in groups without end, which no key takes.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from zo.errors import one_line

MOST_DEPTH, MOST_INTEGER = 32, 2**1000
"""Of groups in groups, and of a whole number, which is to fit into a float."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which writes a list again where another key has it too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_yaml(content: Mapping[str, Any]) -> str:
    """Return a group of plain values as YAML, its keys in their order."""
    dumped = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return str(dumped)


def read_yaml(text: str) -> Any:
    """Return the content of a YAML document.

    Raises:
        ValueError: it cannot be read, or holds something else than plain values; one line.
    """
    try:
        content = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    # A constructor of PyYAML raises what a value makes it raise.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(one_line(error, 300)) from error
    check_plain(content)
    return content


def check_plain(value: Any, depth: int = 0) -> None:
    """Raise :class:`ValueError` unless a value and all in it are of plain types."""
    if depth > MOST_DEPTH:
        raise ValueError(f"it has groups in more than {MOST_DEPTH} others")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_plain(key, MOST_DEPTH)
            check_plain(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_plain(inner, depth + 1)
    elif isinstance(value, int):
        if abs(value) > MOST_INTEGER:
            raise ValueError("it has a whole number of too many digits")
    elif not isinstance(value, str | float | None):
        raise ValueError(f"it has a value of type {type(value).__name__}; quote it to make a text")
