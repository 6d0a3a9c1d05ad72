"""Where models may lie, what is followed and fetched, and what is refused."""

import os
import shutil

import pytest
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.utils.errors import UserError
from tests.checkpoints.test_safetensors import hf_model


def test_links_lead_out_of_a_folder_only_into_the_hubs_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    hf_model().save_pretrained(snapshot)
    shutil.copytree(snapshot, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).unlink()
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "link").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "link"):
        assert open_reader(source).names

    def bad():
        with pytest.raises(UserError, match="leads out of its folder, or no file"):
            open_reader(folder)

    folder = shutil.copytree(snapshot, tmp_path / "copy")  # of the files
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(blobs / "generation_config.json")
    bad()
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    bad()
    (blobs / "config.json").unlink()
    (blobs / "config.json").symlink_to("/etc/hostname")
    folder = snapshot
    bad()


def test_bad_sources_are_refused(tmp_path):
    for source in (tmp_path / "gone", "a/b/c", "gone.gguf", "owner/gone.gguf"):
        with pytest.raises(UserError, match="does not exist"):
            open_reader(source)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UserError, match="is not a model"):
        open_reader(tmp_path / "weights.bin")
    with pytest.raises(UserError, match=r"ask for access and log in with `hf auth login`"):
        open_reader("no-such-owner/no-such-model")  # offline here


def test_a_revision_is_passed_on(monkeypatch, tmp_path):
    asked = []

    def download(repo_id, revision, **kwargs):
        asked.append((repo_id, revision))
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for revision in ("v1.0", "refs/pr/3", "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a"):
        with pytest.raises(UserError, match=f"owner/name has no revision '{revision}'"):
            open_reader(f"owner/name@{revision}")
        assert asked.pop() == ("owner/name", revision)
    with pytest.raises(UserError, match="does not exist"):
        open_reader("owner/name@")


def test_a_gated_model_says_where_to_ask(monkeypatch):
    def gated(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants a real response

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(UserError, match=r"ask for access on its page on the hub"):
        open_reader("owner/model")
