"""Where models may lie, what is followed and fetched, and what is refused."""

import base64
import http.server
import json
import os
import shutil
import threading

import pytest
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

from prom_jax.checkpoints import hub
from prom_jax.checkpoints.pretrained import open_reader
from prom_jax.utils.errors import UserError
from tests.checkpoints.made_up import hf_model


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


class StandIn(http.server.BaseHTTPRequestHandler):
    """What of the hub's API a push needs: making a repository, how files go up, and a commit."""

    repositories, refused = {}, False

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path, status = self.path, 200
        if self.refused or self.headers.get("authorization") != "Bearer hf_stand_in":
            answer, status = {"error": "no"}, 403
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = {
                "private": asked.get("private") or asked.get("visibility") == "private"
            }
            answer = {"url": f"http://{self.headers['Host']}/{name}"}
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            }
        else:
            assert "/commit/" in path, path
            name = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[name][line["value"]["path"]] = content
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/{name}/commit/0",
                "commitOid": "0",
                "success": True,
            }
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def stand_in(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(StandIn, "repositories", {})
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield StandIn
    server.shutdown()
    server.server_close()


def test_an_export_is_pushed_whole_and_private(tmp_path, stand_in, monkeypatch):
    folder = tmp_path / "hf"
    hf_model().save_pretrained(folder)
    page = hub.push(folder, "owner/adapted")
    assert page.endswith("/owner/adapted")
    pushed = stand_in.repositories["owner/adapted"]
    assert pushed.pop("private")
    assert pushed == {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(StandIn, "refused", True)
    with pytest.raises(UserError, match=r"was not pushed .*hf is whole.*`hf upload owner/other"):
        hub.push(folder, "owner/other")


def test_what_cannot_be_pushed_is_said_before(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    for name in ("adapted", "owner/adapted@main", "a/b/c"):
        with pytest.raises(UserError, match="expected owner/name"):
            hub.check_can_push(name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token that may write"):
        hub.check_can_push("owner/adapted")
