"""What is pushed reaches the hub unchanged and private, or nothing does and a line says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer
from hub_stand_in import TOKEN, HubStandIn, hub_in_this_process
from plain import CARD, contents

from zo.errors import UserError
from zo.run.export import write_folder
from zo.run.hub import push

pytestmark = pytest.mark.slow  # One starts a process.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    to = tmp_path_factory.mktemp("push") / "model"
    write_folder(make_llama(), make_tokenizer(), to, CARD)
    return to


def test_the_bytes_arrive_in_a_private_repository(folder):
    """As a user does it: from another process, by environment variables alone."""
    script = (
        "import sys; from pathlib import Path; from zo.run.hub import push; "
        "print(push(Path(sys.argv[1]), 'ann/tuned'))"
    )
    with HubStandIn() as hub:
        own = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
        }
        run = subprocess.run(
            [sys.executable, "-c", script, folder],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **own},
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout == f"{hub.endpoint}/ann/tuned\n"
        assert hub.repos["ann/tuned"].private
        assert hub.repos["ann/tuned"].files == contents(folder)
        assert hub.lfs_files == {"model.safetensors"}


def test_public_only_when_asked(folder, monkeypatch):
    with hub_in_this_process(monkeypatch) as hub:
        assert push(folder, "ann/open", private=False) == f"{hub.endpoint}/ann/open"
        assert not hub.repos["ann/open"].private
        assert hub.repos["ann/open"].files == contents(folder)
        # What is there already and public must not take a push that was meant to be private.
        requests = len(hub.requests)
        with pytest.raises(UserError, match="exists and is public"):
            push(folder, "ann/open")
        assert not any("commit" in request for request in hub.requests[requests:])


def test_the_client_that_has_xet_pushes_too(folder, monkeypatch):
    """With Xet, huggingface_hub takes another way through its code: batches, each a commit."""
    with hub_in_this_process(monkeypatch, xet=True) as hub:
        push(folder, "ann/tuned")
        assert hub.repos["ann/tuned"].private
        assert hub.repos["ann/tuned"].files == contents(folder)


def test_a_second_push_leaves_no_weights_of_the_first(folder, monkeypatch):
    with hub_in_this_process(monkeypatch) as hub:
        push(folder, "tuned")
        files = hub.repos["ann/tuned"].files
        files |= {
            "model-00001-of-00002.safetensors": b"old",
            "model.safetensors.index.json": b"{}",
            "LICENSE": b"mine",
        }
        push(folder, "tuned")
        assert files == {**contents(folder), "LICENSE": b"mine"}


def refusal(folder, repo_id):
    with pytest.raises(UserError) as caught:
        push(folder, repo_id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_are_one_line_with_a_remedy(folder, monkeypatch, tmp_path):
    with hub_in_this_process(monkeypatch, token="hf_bad") as hub:
        said = refusal(folder, "ann/tuned")
        assert "`hf auth login`" in said
        assert "HF_TOKEN" in said
        assert hub.repos == {}
    with hub_in_this_process(monkeypatch) as hub:
        assert "rights to create a model under bob" in refusal(folder, "bob/tuned")
        assert "namespace/name" in refusal(folder, "a/b/c")
        assert "namespace/name" in refusal(folder, "ann/..tuned")
        assert "does not hold an exported model" in refusal(tmp_path, "ann/tuned")
        assert hub.repos == {}
        hub.fail_uploads_with = 403
        assert "403" in refusal(folder, "ann/tuned")
        assert hub.repos["ann/tuned"].files == {}
    # The server is gone.
    assert "check the connection and HF_ENDPOINT" in refusal(folder, "ann/tuned")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(folder, "ann/tuned")
