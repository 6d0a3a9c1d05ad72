"""Sources: what of them is skipped, and what is known without their weights."""

import json
import shutil

import huggingface_hub
import pytest

from prom_jax import convert
from prom_jax.checkpoints import pretrained
from prom_jax.tokenization.folder import fingerprint
from prom_jax.utils.errors import UserError
from tests.checkpoints.made_up import to_gguf
from tests.reference import hf_model


def same(found, expected):
    """Whether two sources are of one architecture and tokenizer."""
    return found[0] == expected[0].config and fingerprint(found[1]) == fingerprint(expected[1])


# Keys that folders of others have, for generation, trainers and kernels.
IDLE = {"max_length": 20, "temperature": 0.7, "gradient_checkpointing": False, "bf16": True, "use_sdpa": True}


@pytest.mark.parametrize("read", [pretrained.open_source, pretrained.open_config])
def test_keys_without_effect_are_skipped_in_one_line(tiny, tmp_path, capsys, read):
    """No other key is, and a checkpoint made of the folder has none left."""
    whole = pretrained.open_source(tiny / "model")
    assert capsys.readouterr().out == ""
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | IDLE))
    read(folder)
    keys = ", ".join(IDLE)
    line = f"skipped   keys of the config.json of {folder} that cannot change the forward pass: {keys}\n"
    assert capsys.readouterr().out == line
    assert same(pretrained.open_config(folder), whole)

    convert.from_hf(folder, tmp_path / "orbax")
    convert.to_hf(folder, tmp_path / "hf")
    capsys.readouterr()
    for made in ("orbax", "hf"):
        read(tmp_path / made)
    assert capsys.readouterr().out == ""


def test_a_folder_without_weights(tiny, tmp_path, monkeypatch):
    whole = pretrained.open_source(tiny / "model")
    bare = tmp_path / "bare"
    shutil.copytree(tiny / "model", bare)
    (bare / "model.safetensors").unlink()
    assert same(pretrained.open_config(tiny / "model"), whole)
    assert same(pretrained.open_config(bare), whole)

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **k: asked.update(k) or str(bare))
    assert same(pretrained.open_config("owner/name"), whole)
    assert "*.safetensors" not in asked["allow_patterns"] and "*.json" in asked["allow_patterns"]


def test_a_checkpoint_without_its_steps(tiny, tmp_path):
    convert.main(["from_hf", str(tiny / "model"), str(tmp_path / "orbax")])
    whole = pretrained.open_source(tmp_path / "orbax")
    (step,) = (path for path in (tmp_path / "orbax").iterdir() if path.name.isdecimal())
    assert same(pretrained.open_config(step), whole)
    shutil.rmtree(step)
    assert same(pretrained.open_config(tmp_path / "orbax"), whole)


def test_a_gguf_file(tmp_path, monkeypatch, byte_level):
    path = to_gguf(hf_model("llama3"), tmp_path / "model.gguf")
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda source: byte_level)
    monkeypatch.setattr(pretrained, "_check_tokens", lambda *args: None)
    assert pretrained.open_config(path) == (pretrained.open_source(path)[0].config, byte_level)


def test_a_token_without_a_row_of_the_embedding_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    _, tokenizer = pretrained.open_source(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert pretrained.open_source(folder)[1].pad_token_id == rows  # harmless: nothing is computed of it
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    for read in (pretrained.open_source, pretrained.open_config):
        with pytest.raises(
            UserError, match=rf"'<more>' is number {rows + 1}, and the embedding has {rows} rows"
        ):
            read(folder)
