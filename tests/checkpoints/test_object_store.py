"""Checkpoints in an object store: an emulator of Google Cloud Storage in this process."""

import importlib.util
import json
from http import HTTPStatus

import gcsfs
import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

from prom_jax import convert
from prom_jax.checkpoints.description import Description, describe, find
from prom_jax.checkpoints.orbax import CheckpointReader
from prom_jax.checkpoints.storage import resolve_path
from prom_jax.checkpoints.training import Checkpoints
from prom_jax.models.auto import config_from_hf
from prom_jax.utils.errors import UserError
from tests.checkpoints.test_training import abstract, assert_same, make_mesh, state

OBJECT = r"(/download)?/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>[^/]+)"


def read(request, response, storage):
    """Adds the generation, by which TensorStore sees whether another has written meanwhile."""
    objects.get(request, response, storage)
    if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        held = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = held["generation"]


def move(request, response, storage):
    """A request that the emulator does not know."""
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    request.params["dest_bucket_name"] = bucket
    objects.rewrite(request, response, storage)
    if response.status == HTTPStatus.OK:  # not so for the name of a folder
        storage.delete_file(bucket, name)


@pytest.fixture(scope="module")
def closed():
    """An emulator with the bucket `runs`, as the environment tells; buckets that nobody may enter."""
    names = {"closed"}
    handle = server.Router.handle

    def guarded(router, method):
        if any(f"/b/{name}/" in router._request_handler.path for name in names):
            router._request_handler.send_error(HTTPStatus.FORBIDDEN)
        else:
            handle(router, method)

    routes = [
        (rf"{OBJECT}/moveTo/o/(?P<dest_object_id>[^/]+)", {"POST": move}),
        (OBJECT, {"GET": read, "DELETE": objects.delete, "PATCH": objects.patch}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.Router, "handle", guarded)
        patch.setattr(server, "HANDLERS", (*routes, *server.HANDLERS))
        emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
        emulator.start()
        address = f"http://127.0.0.1:{emulator._api._httpd.server_port}"
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # for gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        yield names
        emulator.stop()


@pytest.fixture
def bucket(closed):
    """A client of the emulator."""
    return gcsfs.GCSFileSystem()


def saved(place, losses, **policy):
    """A directory with a state of each step, seeded by its number, and what lies beside the steps."""
    store = Checkpoints(place, **policy)
    for step, loss in losses.items():
        store.save(step, loss, **state(make_mesh("fsdp"), step))
    store.close()
    (resolve_path(place) / "tokenizer" / "tokenizer.json").write_text("{}")
    return store


def names(place):
    return sorted(path.name for path in resolve_path(place).iterdir())


def test_policy_and_another_mesh(bucket):
    place = "gs://runs/policy/checkpoints"
    saved(place, {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}, keep=1, keep_best=1, keep_every=3)
    assert names(place) == ["2", "3", "4", "tokenizer"]
    step, found = Checkpoints(place).resume(**abstract(state(make_mesh("mixed"))))
    assert step == 4
    assert_same(found, state(make_mesh("mixed"), 4))


def test_a_damaged_step_is_named_and_the_one_before_is_used(bucket, capsys):
    place = "gs://runs/damaged"
    saved(place, {1: None, 2: None})
    for path in bucket.find(f"{place}/2"):
        if "/d/" in path:
            bucket.pipe(path, bucket.cat(path)[:100])
    store = Checkpoints(place)
    step, found = store.resume(**abstract(state(make_mesh("one"))))
    assert step == 1
    assert_same(found, state(make_mesh("one"), 1))
    assert "step 2 is damaged" in (told := capsys.readouterr().out) and "going on from step 1" in told
    store.save(2, **state(make_mesh("one"), 2))
    store.close()
    assert names(place) == ["1", "2", "2.damaged", "tokenizer"]


def test_a_step_that_was_not_finished_does_not_count(bucket):
    place = "gs://runs/halves"
    saved(place, {1: None, 2: None})
    bucket.rm(f"{place}/2/commit_success.txt")
    (resolve_path(place) / "notes" / "x").write_text("whatever else lies there")
    assert Checkpoints(place).resume(**abstract(state(make_mesh("one"))))[0] == 1
    assert names(place) == ["1", "notes", "tokenizer"]


def test_conversion(bucket, tiny, tmp_path):
    convert.from_hf(tiny / "model", "gs://runs/converted")
    with pytest.raises(UserError, match="is not empty"):
        convert.from_hf(tiny / "model", "gs://runs/converted")
    for number, source in enumerate((tiny / "model", "gs://runs/converted", "gs://runs/converted/0")):
        convert.to_hf(source, tmp_path / str(number))
    weights = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)]
    assert weights[0] == weights[1] == weights[2]
    bucket.rm("gs://runs/converted/0/commit_success.txt")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        CheckpointReader("gs://runs/converted")


@pytest.mark.parametrize("name, reason", [("closed", "Forbidden"), ("absent", "not found")])
def test_a_bucket_that_cannot_be_used_is_named(bucket, tiny, byte_level, name, reason):
    place = f"gs://{name}/run"
    config = json.loads((tiny / "model" / "config.json").read_text())
    description = Description(config_from_hf(config), {}, "float32", {})
    told = rf"gs://{name}/run cannot be used \({reason}.*see that the bucket is there and open to you"
    with pytest.raises(UserError, match=told):
        describe(Checkpoints(place).directory, description, byte_level)
    with pytest.raises(UserError, match=told):
        convert.from_hf(tiny / "model", place)
    with pytest.raises(UserError, match=rf"{place} (cannot be used|holds no checkpoint)"):
        find(place)


def test_a_save_that_is_refused_costs_one_step_alone(closed, bucket, capsys):
    place = "gs://runs/refused"
    saved(place, {1: None})
    store = Checkpoints(place)
    closed.add("runs")
    for step in (2, 3):
        store.save(step, **state(make_mesh("one"), step))
    with pytest.raises(UserError, match=r"step 3 could not be saved \(.*"):
        store.close()
    assert capsys.readouterr().out.count("WARNING   ") == 2
    closed.remove("runs")
    store = Checkpoints(place)
    assert store.resume(**abstract(state(make_mesh("one"))))[0] == 1
    closed.add("runs")
    store.save(2, **state(make_mesh("one"), 2))
    store._finish()
    closed.remove("runs")
    store.save(3, **state(make_mesh("one"), 3))
    store.close()
    assert names(place) == ["1", "3", "tokenizer"]


def test_what_is_missing_or_not_supported(monkeypatch):
    with pytest.raises(UserError, match="s3://bucket/run is in no place that is supported"):
        resolve_path("s3://bucket/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: gcsfs\. Install it with: pip install .*\[gcs\]'"):
        Checkpoints("gs://runs/x")
