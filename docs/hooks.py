"""Hook of mkdocs: the page of all keys, made from the configuration's schema at every build."""

from dataclasses import fields, is_dataclass
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from zo.config.recipes import keys
from zo.config.schema import Config

HEAD = """# Every key

A recipe sets keys, and the command line overrides them:
`python launch/train.py recipe=NAME key=value ...`. Defaults here are those of the schema; `--help`
lists the values of a recipe, and `--cfg job` shows the resolved configuration. This page is made
from `zo/config/` at every build.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``keys.md``."""
    files.append(File.generated(config, "keys.md", content=keys_page()))
    return files


def keys_page() -> str:
    """Return the page: a table for each group of keys."""
    about = {f.name: (f.type.__doc__ or "") for f in fields(Config) if is_dataclass(f.type)}
    groups: dict[str, list[str]] = {}
    for key, default, sentence in keys():
        group = key.partition(".")[0] if "." in key else ""
        row = f"| `{key}` | {_shown(default)} | {_escaped(sentence)} |"
        groups.setdefault(group, []).append(row)
    parts = [HEAD]
    for group, rows in groups.items():
        title = [f"## {group}", "", about[group].splitlines()[0], ""] if group else []
        parts.append("\n".join([*title, "| key | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _shown(default: Any) -> str:
    if default is None or default == "":
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _escaped(text: str) -> str:
    """Return a sentence as it stands, in a cell of a table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|" else c for c in text)
