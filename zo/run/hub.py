"""A folder on the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from zo.errors import UserError, one_line
from zo.state.run_folder import LOG_FILE

COMMIT_MESSAGE = "Weights, card and configuration of a zo run"

SILENCE_S = 300.0
"""Seconds without a byte that end a push: a commit of many files is answered after a minute."""


def push(folder: Path, repo_id: str, private: bool = True) -> str:
    """Upload a folder to the hub or to ``HF_ENDPOINT``, with ``HF_TOKEN`` or the login's token.

    Args:
        folder: written by :func:`zo.run.export.write_folder` or
            :func:`zo.run.artefact.write_artefact`.
        repo_id: ``namespace/name``, or a name in the token's own namespace; created if missing.
            Weights of an earlier push that are not in the folder are deleted.
        private: refuse a public repository; False creates a public one, and leaves the visibility
            of an existing one as it is.

    Returns:
        The repository's URL.

    Raises:
        UserError: the folder has no model, the token is missing or wrong, the id is invalid, the
            repository is public, or there is no connection or no answer.
    """
    # A log artefact has no weights.
    if not any((folder / name).is_file() for name in ("config.json", LOG_FILE)):
        raise UserError(
            f"push={repo_id}: {folder} does not hold an exported model; export it first"
        )
    try:
        with _impatient():
            return _upload(folder, repo_id, private)
    except UserError:
        raise
    # RuntimeError: huggingface_hub wraps a failed upload of one file in it, and its Rust part
    # raises it.
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"push={repo_id} failed: {_advice(error)}") from error


def _upload(folder: Path, repo_id: str, private: bool) -> str:
    """Create the repository if it is missing, upload the folder, and return the URL."""
    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(url.repo_id).private:
        raise UserError(
            f"push={repo_id} exists and is public; use another name, or push a public one"
        )
    api.upload_folder(
        repo_id=url.repo_id,
        folder_path=folder,
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        commit_message=COMMIT_MESSAGE,
    )
    return str(url)


@contextmanager
def _impatient() -> Iterator[None]:
    """Give up on a hub that is silent; its client waits for ever by default."""
    client = get_session()
    patience = client.timeout
    client.timeout = httpx2.Timeout(SILENCE_S)
    try:
        yield
    finally:
        client.timeout = patience


def _advice(error: BaseException) -> str:
    """Return the cause of a failed push and the remedy, in one line."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    said = one_line(cause, 300)
    if isinstance(cause, HfHubHTTPError):
        if cause.response.status_code in (401, 403):
            return (
                f"the token was refused ({said}); run `hf auth login`, or set HF_TOKEN to a token "
                "with write access"
            )
        return f"the server answered: {said}"
    if isinstance(cause, HFValidationError):
        return f"{said}; give it as namespace/name"
    if isinstance(cause, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    return (
        f"{said or type(cause).__name__}; check the connection and HF_ENDPOINT, then push the "
        "folder again"
    )
