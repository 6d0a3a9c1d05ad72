"""The main job on a tiny random model: what it writes, that it resumes exactly, and what it refuses."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import prom_jax
from prom_jax import generate
from prom_jax import train as door
from prom_jax.analysis.tables import TABLES
from prom_jax.checkpoints.orbax import CheckpointReader
from prom_jax.config import VARIANTS, apply_variant
from prom_jax.data.records import prepare
from prom_jax.evaluation.talk import Talker
from prom_jax.models.lora import is_of_adapter
from prom_jax.training.methods.prom import PROM
from prom_jax.training.setup import recipe
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import CONFIG_FILE, FORMAT, as_dict, write_json
from tests.reference import relative_error
from tests.tiny import tiny_config

TIMINGS = {"tokens_per_second", "model_flops_per_second"}


def metrics(workdir):
    """Rows of metrics.jsonl without what depends on the machine."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run that was never disturbed: its work directory and summary."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, door.train(tiny_config(tiny), workdir)


def test_a_run_learns_and_reports(finished):
    workdir, summary = finished
    rows = metrics(workdir)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["step"] for row in rows if "loss" not in row] == [0, 4, 8]
    for row in steps:
        assert row["loss"] == pytest.approx(row["loss_target"] + 0.5 * row["loss_english"], rel=1e-5)
        assert row["weight_target"] > 0 and row["weight_english"] > 0
    measured = [row for row in steps if "grad_norm_english" in row]
    assert [row["step"] for row in measured] == [1, 4, 8]
    for row in measured:
        parts = row["grad_norm_target"], row["grad_norm_english"]
        assert abs(parts[0] - parts[1]) <= row["grad_norm"] * (1 + 1e-5) and min(parts) > 0
        assert row["grad_norm"] <= sum(parts) * (1 + 1e-5)
    assert summary["final"]["eval_target_bits_per_byte"] < 0.9 * summary["base"]["eval_target_bits_per_byte"]
    assert summary["final"]["eval_pivot_nats"] < summary["base"]["eval_pivot_nats"]
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((workdir / "samples_adapted.json").read_text())) == 2
    assert list((workdir / "tensorboard").iterdir())


def torch_nats(hf, config, tokenizer, workdir):
    """Of the held-out target text by transformers: nats and bits per byte."""
    held_out = prepare(recipe(config, PROM(3, config.pivot.weight)), tokenizer, workdir / "records").holdout
    nats, tokens = 0.0, 0
    for example in held_out.read(range(len(held_out))):
        ids, loss = torch.tensor(example["target_tokens"]).long(), example["target_loss"]
        with torch.no_grad():
            scores = hf(ids[None]).logits[0].log_softmax(-1)
        for t in np.flatnonzero(loss):
            nats -= float(scores[t - 1, ids[t]])
            tokens += 1
    return nats / tokens, nats / math.log(2) / held_out.streams["target"].bytes.sum()


def test_held_out_loss_against_transformers(finished, tiny, byte_level):
    """The last evaluation row, from the exported model and the held-out text, by transformers."""
    workdir, summary = finished
    hf = transformers.AutoModelForCausalLM.from_pretrained(summary["export"], dtype=torch.float32)
    nats, bits = torch_nats(hf, tiny_config(tiny), byte_level, workdir)
    assert summary["final"]["eval_target_nats"] == pytest.approx(nats, rel=1e-4)
    assert summary["final"]["eval_target_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_the_export_loads_everywhere(finished):
    _, summary = finished
    model, tokenizer = prom_jax.load(summary["export"])
    assert model.heads == {"pivot_head": 3}
    hf = transformers.AutoModelForCausalLM.from_pretrained(summary["export"], dtype=torch.float32)
    ids = tokenizer("Habari ya asubuhi")["input_ids"]
    theirs = hf(torch.tensor([ids])).logits.detach().numpy()
    np.testing.assert_allclose(model(jnp.array([ids])), theirs, atol=2e-4)
    prompt = transformers.AutoTokenizer.from_pretrained(summary["export"]).apply_chat_template(
        [{"role": "user", "content": "Habari?"}], tokenize=False, add_generation_prompt=True
    )
    assert "### Instruction:\nHabari?" in prompt


def test_a_work_directory_loads_as_its_export(finished):
    workdir, summary = finished
    tokens = jnp.arange(20)[None]
    ours, exported = prom_jax.load(workdir)[0], prom_jax.load(summary["export"])[0]
    np.testing.assert_array_equal(ours(tokens), exported(tokens))
    np.testing.assert_array_equal(ours.pivot_head[...], exported.pivot_head[...])


class Crash(Exception):
    """Stands for whatever ends a process in the middle of a step."""


@pytest.fixture
def crash(monkeypatch):
    """Runs a training that ends in the middle of writing about a step."""
    write = door.MetricsLog.write

    def train_until(at, config, workdir):
        def torn(log, step, values):
            write(log, step, values)
            if step == at and "loss" in values:
                log._file.write('{"step": 99, "lo')
                log._file.flush()
                raise Crash

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(door.MetricsLog, "write", torn)
            door.train(config, workdir)

    return train_until


@pytest.mark.parametrize("at", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_a_crashed_run_goes_on_as_if_it_had_not(finished, config, tmp_path, crash, at):
    crash(at, config, tmp_path)
    door.train(config, tmp_path)
    assert metrics(tmp_path) == metrics(finished[0])


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_in_the_middle_of_an_epoch(finished, config, tmp_path, crash):
    """The same examples in the same updates; the rest is rounding."""
    crash(5, config, tmp_path)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.batch.accumulation, config.remat = 2, "none"
    door.train(config, tmp_path)
    ours, whole = metrics(tmp_path), metrics(finished[0])
    assert [row["step"] for row in ours] == [row["step"] for row in whole]
    for row, expected in zip(ours, whole, strict=True):
        assert {k: v for k, v in row.items() if "weight" in k} == {
            k: v for k, v in expected.items() if "weight" in k
        }
        assert row == pytest.approx(expected, rel=2e-3)
        if row["step"] <= 3:  # before the checkpoint that it went on from
            assert row == expected


@pytest.mark.slow
def test_adapters_of_a_model_in_4_bits(config, tmp_path, capsys):
    config.method = "bactrian"  # which is compiled soonest
    config.adapter.kind, config.adapter.rank, config.adapter.base_dtype = "lora", 4, "nf4"
    config.steps, config.eval.every, config.eval.samples = 2, 0, 0
    summary = door.train(config, tmp_path / "run")
    assert summary["final"]["eval_target_nats"] < summary["base"]["eval_target_nats"]
    assert f"adapter: {summary['adapter']}" in capsys.readouterr().out
    assert "| adapter.base_dtype | nf4 |" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    tokens = jnp.arange(20)[None]
    ours, merged = (prom_jax.load(summary[name])[0] for name in ("adapter", "export"))
    np.testing.assert_array_equal(ours(tokens), merged(tokens))
    assert np.abs(ours(tokens) - prom_jax.load(config.model)[0](tokens)).max() > 1e-3


@pytest.mark.slow
def test_adapters_alone_are_kept_and_a_crashed_run_goes_on(
    tiny, config, tmp_path, crash, monkeypatch, capsys
):
    """Checkpoints, resumption, exports and what is refused, of a run that trains adapters."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    config.model = str(tmp_path / "model")
    config.adapter.kind, config.adapter.rank, config.adapter.dropout = "lora", 4, 0.1
    config.adapter.base_dtype = "nf4"
    config.steps, config.checkpoint.every = 4, 2
    summary = door.train(config, tmp_path / "whole")
    assert summary["final"]["eval_target_bits_per_byte"] < summary["base"]["eval_target_bits_per_byte"]
    crash(3, config, tmp_path / "run")
    door.train(config, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")

    reader = CheckpointReader(tmp_path / "run" / "checkpoints")
    assert reader.names and all(is_of_adapter(name) for name in reader.tensors)
    models = [prom_jax.load(tmp_path / "run" / name)[0] for name in ("", "adapter", "hf")]
    tokens = jnp.arange(20)[None]
    for other in models[1:]:
        np.testing.assert_array_equal(models[0](tokens), other(tokens))
        np.testing.assert_array_equal(models[0].head("pivot_head"), other.head("pivot_head"))
    assert np.abs(models[0](tokens) - prom_jax.load(tmp_path / "model")[0](tokens)).max() > 0.01

    capsys.readouterr()
    generate.main([f"--model={tmp_path}/run/adapter", "--raw", "--max_new_tokens=4", "Habari"])
    assert capsys.readouterr().out.strip()

    # Training goes on from the adapter, where it stood.
    config.model, config.steps = str(tmp_path / "run" / "adapter"), 2
    config.export.hub, pushed = "owner/name", {}
    monkeypatch.setattr(door.hub, "check_can_push", lambda repository: None)
    monkeypatch.setattr(door.hub, "push", lambda folder, repository: pushed.update({repository: folder}))
    on = door.train(config, tmp_path / "on")
    assert pushed == {"owner/name": tmp_path / "on" / "hf", "owner/name-lora": tmp_path / "on" / "adapter"}
    config.export.hub = ""
    assert on["base"]["eval_target_nats"] == pytest.approx(summary["final"]["eval_target_nats"], rel=1e-5)
    assert on["base"]["eval_pivot_nats"] == pytest.approx(summary["final"]["eval_pivot_nats"], rel=1e-5)
    kept = json.loads((tmp_path / "on" / "adapter" / "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == str(tmp_path / "model")

    # Another base model in the same place.
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name: 2 * value for name, value in tensors.items()}
    save_file(changed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds an adapter of .*, which is another model now"):
        prom_jax.load(tmp_path / "run")
    config.model, config.steps = str(tmp_path / "model"), 4
    with pytest.raises(UserError, match=r"holds a run with base='.*': give another --workdir"):
        door.train(config, tmp_path / "run")


def train_apart(config, workdir):
    """`train` as a command, with one device and optimised code, as real weights need it."""
    path = workdir.with_suffix(".json")
    write_json(path, {"format": FORMAT} | as_dict(config))
    command = [sys.executable, "-m", "prom_jax.train", f"--config={path}", f"--workdir={workdir}"]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""})
    return json.loads((workdir / "summary.json").read_text())


def train_by_peft(model, tokens):
    """Three steps of AdamW on the likelihood of the tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny", "smollm2"])
def test_an_adapter_is_trained_by_peft_and_here_in_turn(request, config, tmp_path, base):
    """Each goes on where the other stopped: logits and held-out losses are those of the other."""
    train = door.train
    if base == "smollm2":
        train, config.model = train_apart, str(request.getfixturevalue("smollm2")[2])
        config.batch.sequences = 2
    config.adapter.kind, config.adapter.rank, config.adapter.alpha = "lora", 4, 6.0
    config.steps, config.eval.samples = 2, 0
    tokens = torch.arange(300)[None] * 7 % 300
    hf = transformers.AutoModelForCausalLM.from_pretrained(config.model)
    kind = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear")
    model, logits = peft.get_peft_model(hf, kind), []
    for turn in range(2):
        train_by_peft(model, tokens)
        theirs = tmp_path / f"theirs{turn}"
        model.save_pretrained(theirs)
        given = model.eval()(tokens).logits.detach()
        ours, tokenizer = prom_jax.load(theirs)
        assert relative_error(ours(tokens.numpy()), given) < 1e-4

        config.model, workdir = str(theirs), tmp_path / f"ours{turn}"
        summary = train(config, workdir)
        nats, _ = torch_nats(model, config, tokenizer, workdir)
        assert summary["base"]["eval_target_nats"] == pytest.approx(nats, rel=1e-4)

        model = peft.AutoPeftModelForCausalLM.from_pretrained(workdir / "adapter", is_trainable=True)
        taken = model.eval()(tokens).logits.detach()
        assert relative_error(prom_jax.load(workdir)[0](tokens.numpy()), taken) < 1e-4
        nats, _ = torch_nats(model, config, tokenizer, workdir)
        assert summary["final"]["eval_target_nats"] == pytest.approx(nats, rel=1e-4)
        logits += [given, taken]
    for before, after in itertools.pairwise(logits):
        assert relative_error(after, before) > 1e-3


def test_a_finished_run_is_left_as_it_is(finished, config, capsys):
    workdir, summary = finished
    kept = json.loads((workdir / CONFIG_FILE).read_text())
    begun = kept["versions"] | {"jax": "0.1"}
    write_json(workdir / CONFIG_FILE, kept | {"versions": begun})
    again = door.train(config, workdir)
    assert again["final"] == summary["final"] and len(metrics(workdir)) == 11
    assert f"the run was begun with jax 0.1, now {jax.__version__}" in capsys.readouterr().out
    assert json.loads((workdir / CONFIG_FILE).read_text())["versions"] == begun

    (workdir / CONFIG_FILE).unlink()
    assert door.train(config, workdir)["final"] == summary["final"]
    assert "has checkpoints and no config.json" in " ".join(capsys.readouterr().out.split())
    assert json.loads((workdir / CONFIG_FILE).read_text()) == kept


def test_a_run_goes_on_with_moved_files_and_writes_again_what_is_lost(finished, config, tiny, tmp_path):
    workdir, summary = finished
    kept = (workdir / CONFIG_FILE).read_text()
    described = (workdir / "checkpoints" / "model.json").read_text()
    (workdir / "checkpoints" / "model.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "tokenizer")
    shutil.copytree(tiny, tmp_path / "moved")
    for key in ("english", "target", "translation"):
        config.data[key] = tuple(
            name.replace(str(tiny), str(tmp_path / "moved")) for name in config.data[key]
        )
    config.model = str(tmp_path / "moved" / "model")
    again = door.train(config, workdir)
    assert again["final"] == summary["final"] and len(list((workdir / "records").iterdir())) == 1
    assert json.loads((workdir / CONFIG_FILE).read_text())["model"] == config.model
    now = (workdir / "checkpoints" / "model.json").read_text()
    assert now == described.replace(str(tiny / "model"), config.model)
    prom_jax.load(workdir)

    rows = tmp_path / "moved" / "sw.jsonl"
    rows.write_text(rows.read_text().replace("maziwa", "chai"))
    with pytest.raises(UserError, match=r"holds a run with data\.target=.*moved") as error:
        config.data.target = (str(shutil.move(rows, tmp_path / "other.jsonl")),)
        door.train(config, workdir)
    assert "model=" not in str(error.value)
    config.data.target = (str(tiny / "sw.jsonl"),)
    tensors = load_file(tiny / "model" / "model.safetensors")
    save_file({name: 2 * x for name, x in tensors.items()}, tmp_path / "moved/model/model.safetensors")
    with pytest.raises(UserError, match=r"holds a run with base='"):
        door.train(config, workdir)
    (workdir / CONFIG_FILE).write_text(kept)


def test_sigterm_saves_and_asks_to_be_run_again(config, tmp_path, monkeypatch):
    write = door.MetricsLog.write

    def interrupt(log, step, values):
        write(log, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(door.MetricsLog, "write", interrupt)
    with pytest.raises(SystemExit) as stop:
        door.train(config, tmp_path)
    assert stop.value.code == door.REQUEUE
    assert door.Checkpoints(tmp_path / "checkpoints").latest() in (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["xllama2", "published"])
def test_variants_run(config, tmp_path, variant):
    apply_variant(config, variant, {"published": VARIANTS["published"] | {"pivot.layer": 2}})
    config.data.seq_len, config.steps = 256, 2
    summary = door.train(config, tmp_path)
    assert math.isfinite(summary["final"]["eval_target_nats"])


def test_a_dry_run_loads_no_weights(config, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(door.weights, "load_params")
    assert door.train(config, tmp_path, dry_run=True) == {}
    printed = capsys.readouterr().out
    assert "steps     8" in printed and "FLOPs" in printed and "GiB a device" in printed and "fits" in printed
    assert not (tmp_path / "checkpoints").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(config, tmp_path):
    config.checkpoint.every, config.optimizer.learning_rate, config.optimizer.clip = 1, 1e30, 0.0
    with pytest.raises(UserError, match=r"step \d: loss .*last good checkpoint is step [12] in"):
        door.train(config, tmp_path)
    assert all("loss" not in row or math.isfinite(row["loss"]) for row in metrics(tmp_path))


def set_(path, value):
    return lambda c, tmp: c.update_from_flattened_dict({path: value})


def no_output(c, tmp):
    (tmp / "rows.jsonl").write_text('{"id": 0, "instruction": "hi"}')
    c.data.target = (str(tmp / "rows.jsonl"),)


def lengths_differ(c, tmp):
    for name, number in (("en", 3), ("sw", 2)):
        rows = [{"instruction": "a", "output": "b"}] * number
        (tmp / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    c.data.english, c.data.target = (str(tmp / "en.jsonl"),), (str(tmp / "sw.jsonl"),)


def truncated_weights(c, tmp):
    shutil.copytree(c.model, tmp / "model")
    path = tmp / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    c.model = str(tmp / "model")


def corrupt_gguf(c, tmp):
    (tmp / "model.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    c.model = str(tmp / "model.gguf")


def another_architecture(c, tmp):
    shutil.copytree(c.model, tmp / "model")
    path = tmp / "model" / "config.json"
    path.write_text(path.read_text().replace('"LlamaForCausalLM"', '"GemmaForCausalLM"'))
    c.model = str(tmp / "model")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (set_("model", "/no/such/model"), "/no/such/model does not exist"),
        (set_("model", "nobody/nothing"), "nobody/nothing is no local path.*hf auth login"),
        (another_architecture, "unsupported architecture.*GemmaForCausalLM"),
        (truncated_weights, "model.safetensors"),
        (corrupt_gguf, "model.gguf"),
        (lengths_differ, "3 .*2 "),
        (no_output, "rows.jsonl.*'output'"),
        (set_("data.seq_len", 8), "seq_len"),
        (set_("pivot.layer", 4), "pivot.layer=4: expected 1 to 3"),
        (set_("mesh.tensor", 3), "mesh.tensor=3 does not match the 8 devices"),
        (
            set_("data.english", ()),
            "trains on the stream 'english', and the data have none of it: set data.english",
        ),
        (set_("pivot.weight", math.nan), "pivot.weight=nan"),
        (set_("optimizer.learning_rate", math.nan), "optimizer.learning_rate=nan"),
        (set_("attention", "cudnn"), "attention='cudnn' needs .* a GPU"),
        (set_("attention", "splash"), "attention='splash' needs a TPU"),
        (set_("attention", "tokamax"), "attention='tokamax' needs a GPU"),
        (set_("pivot.regulate", "maybe"), "pivot.regulate='maybe': expected one of"),
        (set_("method", "promm"), "method='promm'"),
        (set_("language", ""), "language is not set"),
        (set_("batch.accumulation", 3), "batch.accumulation=3"),
        (set_("eval.holdout", 1000), "holdout"),
        (set_("compute_dtype", "int4"), "compute_dtype='int4'"),
    ],
)
def test_bad_input_is_one_clear_sentence(config, tmp_path, spoil, message):
    spoil(config, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        door.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_another_configuration_is_refused(finished, config):
    config.optimizer.learning_rate = 1.0
    with pytest.raises(UserError, match=r"holds a run with optimizer.learning_rate=0.003, now 1.0"):
        door.train(config, finished[0])


@pytest.mark.parametrize("number", [None, 99])
def test_a_run_of_another_version_is_not_continued(finished, config, tmp_path, number):
    kept = json.loads((finished[0] / CONFIG_FILE).read_text())
    assert kept.pop("format") == FORMAT
    (tmp_path / CONFIG_FILE).write_text(json.dumps(kept | ({"format": number} if number else {})))
    told = (
        f"of format {number or 1}, this version has {FORMAT} and cannot go on with it: give another --workdir"
    )
    with pytest.raises(UserError, match=told):
        door.train(config, tmp_path)


@pytest.mark.slow
def test_changed_data_is_another_run(config, tmp_path):
    rows = tmp_path / "sw.jsonl"
    shutil.copy(config.data.target[0], rows)
    config.data.target, config.steps = (str(rows),), 1
    door.train(config, tmp_path / "run")
    rows.write_text(rows.read_text().replace("maziwa", "chai"))
    with pytest.raises(UserError, match="holds a run with records="):
        door.train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_start_that_failed_leaves_the_work_directory_free(config, tmp_path):
    good = config.model
    truncated_weights(config, tmp_path)
    with pytest.raises(UserError):
        door.train(config, tmp_path / "run")
    config.model, config.steps = good, 1
    assert door.train(config, tmp_path / "run")["steps"] == 1


def test_a_work_directory_that_cannot_be(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.* cannot be made a folder"):
        door.train(config, tmp_path / "file")


def command(tiny, workdir, *more):
    c = tiny_config(tiny)
    path = workdir.parent / f"{workdir.name}.py"
    path.write_text(
        "from prom_jax import config as configuration\n\n\ndef get_config(variant=''):\n"
        f"    c = configuration.default()\n    c.update({json.loads(c.to_json())!r})\n    return c\n"
    )
    return [sys.executable, "-m", "prom_jax.train", f"--config={path}", f"--workdir={workdir}", *more]


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.pivot.wait=0.3", "unknown configuration key 'wait' in --config.pivot.wait=0.3"),
        ("--config=configs/xx.py", "xx.py"),
        ("--config.steps=many", "--config.steps=many: expected an integer"),
        ("--wrokdir=x", "wrokdir"),
    ],
)
def test_bad_flags_are_one_line(tiny, tmp_path, flag, message):
    with pytest.raises(UserError, match=re.escape(message)) as told:
        door.parse(command(tiny, tmp_path / "run", flag)[3:])
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_kill_9_at_random_moments(tiny, finished, tmp_path):
    """The process is killed twice, wherever it happens to be; the end is that of an unbroken run."""
    chance, workdir = random.Random(time.time_ns()), tmp_path / "run"
    for _ in range(2):
        before = len(metrics(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(command(tiny, workdir))
        while process.poll() is None and (
            not (workdir / "metrics.jsonl").exists() or len(metrics(workdir)) <= before
        ):
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1))
        process.kill()
        process.wait()
    subprocess.run(command(tiny, workdir), check=True)
    assert metrics(workdir) == metrics(finished[0])


@pytest.mark.slow
@pytest.mark.main_job
def test_the_main_job_on_real_weights(tmp_path):
    """SmolLM2-135M learns Swahili: a few steps of the demo, through the command, after a short probe."""
    table = (TABLES / "sw.csv").read_text(encoding="utf-8").splitlines()[:13]
    (tmp_path / "sw").mkdir()
    (tmp_path / "sw" / "clean.csv").write_text("\n".join(table), encoding="utf-8")
    arguments = [
        "--config=configs/demo.py",
        f"--config.model={os.environ['SMOLLM2']}",
        f"--config.probe.tables={tmp_path}",
        "--config.pivot.regulate=mean",  # by a task and a set of demonstrations alone
        f"--workdir={tmp_path / 'run'}",
    ]
    arguments += ["--config.steps=4", "--config.eval.every=0", "--config.eval.holdout=8"]
    arguments += ["--config.eval.samples=0"]
    environment = os.environ | {"XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-m", "prom_jax.train", *arguments], check=True, env=environment)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["regulation_probe"]["rows"] == 7 and summary["pivot.layer"] == 22
    base, final = summary["base"], summary["final"]
    assert final["eval_target_bits_per_byte"] < 0.95 * base["eval_target_bits_per_byte"]
    assert final["eval_english_bits_per_byte"] < 1.02 * base["eval_english_bits_per_byte"]
    hf = transformers.AutoModelForCausalLM.from_pretrained(summary["export"])
    assert sum(p.numel() for p in hf.parameters()) == 134_515_008


@pytest.mark.slow
def test_a_chat_template_is_kept_to_the_end(tiny, tmp_path):
    """The export, checkpoints and samples ask as training did, and answers end as it ended them."""
    text = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<unk>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(text)
    config = tiny_config(tiny)
    config.data.template, config.steps = str(tmp_path / "own.jinja"), 2
    door.train(config, tmp_path / "run")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    assert exported.chat_template == text
    settings = json.loads((tmp_path / "run" / "hf" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [exported.eos_token_id, exported.convert_tokens_to_ids("<unk>")]
    said = [{"role": "user", "content": "Hi"}]
    expected = exported.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    for source in (tmp_path / "run" / "hf", tmp_path / "run"):
        talker = Talker(source, template="auto", max_new_tokens=4, sampling={})
        assert talker.conversation(said) == expected and set(talker.stops) == set(settings["eos_token_id"])
    samples = json.loads((tmp_path / "run" / "samples_adapted.json").read_text())
    assert all(sample["prompt"].startswith("user") for sample in samples)
