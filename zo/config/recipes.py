"""Recipes: YAML files of changed keys, composed by Hydra over the schema of ``config``."""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, FrozenInstanceError, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from zo.config.plain_yaml import check_plain, read_yaml
from zo.config.schema import Config
from zo.errors import UserError, one_line

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
"""Package data; in a checkout a link to the folder beside the package."""
DEFAULT, OWN = "quickstart", "default"
"""Recipes of a command that names none: as it is, and with a model or data of the user's own."""
NO_DATA = [
    "data.name=''",
    "data.split=train",
    *(f"data.{key}=null" for key in ("subset", "dev", "columns", "template", "label_words")),
]
"""Overrides that a task on the command line sets first: it replaces the data of the recipe."""
REFUSED = (ValueError, TypeError, RecursionError, OverflowError, YAMLError)
"""Raised within Hydra and OmegaConf by values that they do not expect."""
OTHER_NAMES = {
    "learning_rate": "update.lr",
    "lr_scheduler_type": "update.schedule",
    "epsilon": "estimator.eps",
    "zo_eps": "estimator.eps",
    "num_samples": "estimator.directions",
    "max_length": "batch.max_tokens",
    "max_seq_length": "batch.max_tokens",
    "batch_size": "batch.sequences",
    "per_device_train_batch_size": "batch.micro",
    "model_name_or_path": "model.name",
    "model_id": "model.name",
    "torch_dtype": "model.dtype",
    "tokenizer_name": "model.tokenizer",
    "dataset": "data.name",
    "dataset_name": "data.name",
    "train_file": "data.name",
    "validation_file": "data.dev",
    "output_dir": "run.dir",
    "max_steps": "run.steps",
    "eval_steps": "eval.every",
    "save_steps": "run.snapshot_every",
}
"""Our keys by the names that they have in other libraries and in the papers' code."""


def _schema() -> DictConfig:
    """Return the typed schema, into which values may be merged."""
    node: DictConfig = OmegaConf.structured(Config)
    for group in (node, *(node[f.name] for f in fields(Config) if is_dataclass(f.type))):
        # Frozen dataclasses become read-only nodes, which a recipe could not be merged into.
        OmegaConf.set_readonly(group, None)
    return node


def recipe_names() -> list[str]:
    """Return the names of the recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def header(path: Path) -> str:
    """Return the first line of a recipe, which says what it is for."""
    return path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")


def recipe_file(recipe: str) -> Path:
    """Return the file of a recipe: a name, or the path of a ``.yaml`` file.

    Raises:
        UserError: there is none.
    """
    if recipe in recipe_names():
        return FOLDER / f"{recipe}.yaml"
    path = Path(recipe).expanduser()
    if path.suffix != ".yaml":
        raise UserError(
            f"recipe={recipe} is not known; use one of {', '.join(recipe_names())}, or the path of "
            "a .yaml file"
        )
    if not path.is_file():
        raise UserError(
            f"recipe={recipe} is not a file; zo init to={recipe} makes one from a recipe"
        )
    return path.resolve()


def recipe_for(overrides: Sequence[str]) -> str:
    """Return the recipe of a command that names none.

    The quickstart's rate suits its own model and data alone.
    """
    own = ("model.name=", "data.name=")
    return OWN if any(o.lstrip("+").startswith(own) for o in overrides) else DEFAULT


def resolve(recipe: str = DEFAULT, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a recipe with overrides by Hydra, types checked.

    Raises:
        UserError: unknown recipe or key, wrong type, or an override that is no ``key=value``.
    """
    file = recipe_file(recipe)
    if any(override.startswith("task=") for override in overrides):
        overrides = [*NO_DATA, *overrides]
    check_recipe(file)
    # Every recipe names the schema first in its defaults.
    ConfigStore.instance().store("schema", _schema())
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3"):
            return compose(file.stem, overrides=[*overrides, f"recipe={file.stem!r}"])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except REFUSED as error:
        raise UserError(
            f"recipe={recipe} cannot be composed with these arguments: {_first_line(error)}"
        ) from error


def check_recipe(path: Path) -> None:
    """Check that a recipe's file is plain YAML, before Hydra composes it.

    Raises:
        UserError: it cannot be read, or is not a group of keys.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"recipe {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} is not a group of keys; give key: value in each line")


def load_config(recipe: str = DEFAULT, overrides: Sequence[str] = ()) -> Config:
    """Return a recipe with overrides as a checked configuration.

    Args:
        recipe: name of a file in ``recipes/``, or the path of a ``.yaml`` file.
        overrides: ``key=value`` as on the command line.

    Raises:
        UserError: as :func:`resolve`, or a value out of its range.
    """
    return as_config(resolve(recipe, overrides))


def as_config(node: DictConfig) -> Config:
    """Return a composed node as a checked configuration."""
    try:
        made = OmegaConf.to_object(node)
    except FrozenInstanceError as error:  # A key that + added.
        raise UserError(f"unknown key: {error}; see --help for all keys") from error
    except UserError:
        raise
    except (OmegaConfBaseException, *REFUSED) as error:
        raise UserError(f"a value cannot be used: {_first_line(error)}") from error
    assert isinstance(made, Config)
    return made


def config_of(tree: Mapping[str, Any]) -> Config:
    """Return a checked configuration from nested keys, as a run's ``config.yaml`` holds them.

    ``model.trust_remote_code`` is always false in it: a folder that someone sends must not decide
    that code is run.

    Raises:
        UserError: a key or a value that this version does not know.
    """
    try:
        check_plain(tree)
    except ValueError as error:
        raise UserError(f"the run's config.yaml cannot be used: {error}") from error
    # Stored values are resolved ones: an interpolation would read this machine's environment into
    # what is written.
    if "${" in str(tree):
        raise UserError(
            "the run's config.yaml holds an interpolation, ${...}, which no run writes; take it out"
        )
    try:
        node = OmegaConf.merge(
            _schema(), OmegaConf.create(dict(tree)), {"model": {"trust_remote_code": False}}
        )
    except (OmegaConfBaseException, *REFUSED) as error:
        raise UserError(
            f"the run's config.yaml does not fit this version of zo: {_first_line(error)}"
        ) from error
    assert isinstance(node, DictConfig)
    return as_config(node)


def _first_line(error: Exception) -> str:
    said = str(error) or type(error).__name__
    return one_line(said) if isinstance(error, YAMLError) else said.split("\n")[0]


def _explain(error: Exception) -> str:
    """Return Hydra's or OmegaConf's error as one line that names the key."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} is not understood; give key=value, and quote a value with special "
            "characters, for the shell too: \"key='...'\""
        )
    # Hydra's outer message names the override, OmegaConf's inner one says what is wrong with it.
    inner = str(error.__cause__ or "").split("\n")[0]
    outer = str(error).split("\n")[0]
    full_key = getattr(error.__cause__, "full_key", None)
    if inner.startswith("Key "):
        name = str(full_key or "").split(".")[-1]
        known = [key for key, _, _ in keys()]
        close = (
            [key for other, key in OTHER_NAMES.items() if other == name]
            or [key for key in known if key.split(".")[-1] == name]
            or [key for key in known if name and key.split(".")[-1][:2] == name[:2]]
        )
        hint = f"did you mean {' or '.join(close[:3])}? " if close else ""
        return f"unknown key {full_key or outer}; {hint}see --help for all keys"
    return f"{outer.rstrip('.')}: {inner}" if inner else outer


def keys() -> Iterator[tuple[str, Any, str]]:
    """Yield every key with its default and its sentence."""
    for group in fields(Config):
        if group.name == "task":
            yield group.name, group.default, _sentences(Config)[group.name]
        if is_dataclass(group.type):
            sentences = _sentences(group.type)  # type: ignore[arg-type]
            for f in fields(group.type):
                default = f.default if f.default is not MISSING else None
                yield f"{group.name}.{f.name}", default, sentences.get(f.name, "")


def _sentences(dataclass: type) -> dict[str, str]:
    """Return the string under each field of a dataclass in its source."""
    tree = ast.parse(inspect.getsource(sys.modules[dataclass.__module__]))
    body = next(
        n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == dataclass.__name__
    )
    found = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = getattr(getattr(following, "value", None), "value", None)
            if isinstance(text, str):
                found[statement.target.id] = " ".join(text.replace("``", "").split())
    return found
