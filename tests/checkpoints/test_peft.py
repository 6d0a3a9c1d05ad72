"""Adapters in PEFT's format: in, out, merged, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import prom_jax
from prom_jax import convert
from prom_jax.checkpoints import peft as our_peft
from prom_jax.checkpoints.adapter import Adapted, Merged, NewAdapter, with_adapter
from prom_jax.checkpoints.params import lazy_params, load_params
from prom_jax.checkpoints.peft import PEFTReader
from prom_jax.checkpoints.pretrained import open_reader, open_source
from prom_jax.models import decoder
from prom_jax.models.lora import LoRA
from prom_jax.ops.quantised import Quantised, dequantise
from prom_jax.parallel import sharding
from prom_jax.utils.errors import UserError
from tests.reference import hf_model, relative_error

TOKENS = np.arange(60)[None] * 7 % 199
RANK = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory, byte_level):
    """base: a random model; adapter: of random values, as peft writes it."""
    root = tmp_path_factory.mktemp("peft")
    hf = hf_model("llama3", vocab_size=len(byte_level))
    hf.save_pretrained(root / "base")
    byte_level.save_pretrained(root / "base")
    hf = transformers.AutoModelForCausalLM.from_pretrained(root / "base")  # it knows where it is from
    kind = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=6, target_modules="all-linear")
    adapted = peft.get_peft_model(hf, kind)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(root / "adapter")
    return root


def peft_logits(folder):
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def unmerged(reader):
    """The model with its adapter apart."""
    lora = reader.adapter.lora
    params = load_params(with_adapter(reader, lora, {}, 0), lora=lora)
    return decoder.with_params(decoder.abstract(reader.config, lora=lora), params)


def test_an_adapter_of_others_is_read(root):
    reader, tokenizer = open_source(root / "adapter")
    assert isinstance(reader, Merged) and reader.adapter.lora.rank == RANK
    assert tokenizer("the")["input_ids"]  # the base model's, as peft wrote none
    model, _ = prom_jax.load(root / "adapter")
    theirs = peft_logits(root / "adapter")
    assert relative_error(model(TOKENS), theirs) < 3e-5
    assert relative_error(prom_jax.load(root / "base")[0](TOKENS), theirs) > 0.01
    assert relative_error(unmerged(reader)(TOKENS), theirs) < 3e-5


def test_an_adapter_is_written_as_peft_reads_it(root, tmp_path):
    reader, tokenizer = open_source(root / "adapter")
    card = {"base_model": str(root / "base"), "method": "prom"}
    settings = {"base": reader.adapter.base, "chat_template": "a template", "card": card}
    our_peft.save(reader.adapter, tokenizer, tmp_path / "out", dtype="float32", **settings)
    before, after = (load_file(folder / our_peft.WEIGHTS) for folder in (root / "adapter", tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
    assert peft_logits(tmp_path / "out") == pytest.approx(peft_logits(root / "adapter"), abs=0)
    again = PEFTReader(tmp_path / "out")
    assert again.lora == reader.adapter.lora and again.base == str(root / "base")
    assert again.details == {"base_model": "base", "method": "prom"}
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in readme and "AutoPeftModelForCausalLM.from_pretrained" in readme
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with safe_open(tmp_path / "out" / our_peft.WEIGHTS, "numpy") as file:
        assert file.metadata()["format"] == "pt"
    our_peft.save(again, tokenizer, tmp_path / "out", dtype="bfloat16", **settings)  # an earlier export
    assert {str(x.dtype) for x in load_file(tmp_path / "out" / our_peft.WEIGHTS).values()} == {"bfloat16"}


def test_an_adapter_is_merged_into_a_folder_of_its_own(root, tmp_path):
    convert.main(["merge", str(root / "adapter"), str(tmp_path / "merged")])
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = hf(torch.from_numpy(TOKENS)).logits.numpy()
    assert relative_error(logits, peft_logits(root / "adapter")) < 3e-5
    with pytest.raises(UserError, match="has no adapter that could be merged: convert to_hf"):
        convert.main(["merge", str(root / "base"), str(tmp_path / "again")])


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(root):
    base = open_reader(root / "base")
    lora = LoRA(RANK, 6.0, ("q_proj", "down_proj", "pivot_head"))
    heads = {"pivot_head": 3}
    params = load_params(with_adapter(base, lora, heads, 1), heads=heads, lora=lora)
    assert not any(params[name]["q_proj_lora_b"].any() for name in ("stack0", "stack1"))
    assert not params["pivot_head_lora_b"].any() and params["pivot_head_lora_a"].shape == (RANK, 64)
    down = np.concatenate([params[name]["down_proj_lora_a"] for name in ("stack0", "stack1")])
    assert down.shape == (4, RANK, 96) and 0.9 < np.abs(down).max() * 96**0.5 <= 1
    assert len(np.unique(down)) == down.size
    # However the stacks are cut and sharded.
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    other = lambda seed: load_params(
        with_adapter(base, LoRA(RANK, 6.0, lora.targets[:2]), {}, seed),
        mesh,
        lora=LoRA(RANK, 6.0, lora.targets[:2]),
    )["stack0"]["down_proj_lora_a"]
    np.testing.assert_array_equal(other(1), down)
    assert (np.asarray(other(2)) != down).all()


def test_training_goes_on_with_an_adapter_of_the_same_kind_alone(root):
    reader = open_reader(root / "adapter")
    same = reader.adapter.lora
    params = load_params(with_adapter(reader, same, {}, 0), lora=same)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    np.testing.assert_array_equal(params["stack0"]["up_proj_lora_b"][2], reader.adapter.read(name, ...))
    # A head that it has not begins anew.
    lora = LoRA(RANK, 6.0, (*same.targets, "pivot_head"))
    heads = {"pivot_head": 3}
    params = load_params(with_adapter(reader, lora, heads, 0), heads=heads, lora=lora)
    np.testing.assert_array_equal(params["stack0"]["up_proj_lora_b"][2], reader.adapter.read(name, ...))
    assert not params["pivot_head_lora_b"].any()
    for lora, message in (
        (LoRA(8, 6.0, same.targets), "rank=4, and adapter.rank is 8"),
        (LoRA(RANK, 6.0, ("q_proj",)), r"targets=\('down_proj', .*merge"),
        (LoRA(RANK, 6.0, same.targets, rslora=True), "rslora=False, and adapter.rslora is True"),
    ):
        with pytest.raises(UserError, match=message):
            with_adapter(reader, lora, {}, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': expected plain LoRA.*merge_and_unload"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"a_new_variant": 1}, "a_new_variant=1"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None"),
        ({"r": 0}, "r=0"),
        ({"r": 8}, r"has the shape \[4, 64\], the config says \[8, 64\]"),
        ({"base_model_name_or_path": "no/where"}, "no/where"),
    ],
)
def test_other_kinds_are_refused_by_name(root, tmp_path, changes, message):
    shutil.copytree(root / "adapter", tmp_path / "other")
    path = tmp_path / "other" / our_peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        open_reader(tmp_path / "other")


def test_other_tensors_are_refused_by_name(root, tmp_path):
    def refused(change, message):
        shutil.copytree(root / "adapter", tmp_path / "other", dirs_exist_ok=True)
        tensors = load_file(root / "adapter" / our_peft.WEIGHTS)
        change(tensors)
        save_file(tensors, tmp_path / "other" / our_peft.WEIGHTS)
        with pytest.raises(UserError, match=message):
            open_reader(tmp_path / "other")

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    refused(
        lambda x: x.update({embedding: x[first]}), "embed_tokens.lora_embedding_A': expected adapters of lin"
    )
    refused(lambda x: x.pop(first), rf"lacks {first}")
    refused(
        lambda x: x.update({first.replace("s.0", "s.9"): x[first]}), r"layers\.9\.self_attn.*are an adapter"
    )
    (tmp_path / "other" / our_peft.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors.*save the adapter again"):
        open_reader(tmp_path / "other")


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_model_computes_with_the_values_of_its_codes(root, kind):
    reader = open_reader(root / "adapter")
    lora = dataclasses.replace(reader.adapter.lora, base_dtype="float32", quantised=kind)
    settings = {"heads": {"pivot_head": 3}, "lora": lora}
    params = load_params(with_adapter(reader, lora, {}, 0), **settings)
    parts = load_params(with_adapter(reader, lora, {}, 0), sharding.make_mesh(fsdp=4, tensor=2), **settings)
    jax.tree.map(np.testing.assert_array_equal, parts, params)

    def logits(params, lora):
        model = decoder.abstract(reader.config, heads=settings["heads"], lora=lora)
        return decoder.with_params(model, params)(TOKENS)

    plain, maps = jax.tree.map(lambda x: x, params), []
    for name in ("stack0", "stack1"):
        maps = [key for key in params[name] if key + "_scales" in params[name]]
        for key in maps:
            weight = Quantised(plain[name][key], plain[name].pop(f"{key}_scales"))
            plain[name][key] = dequantise(weight, "float32")
    assert len(maps) == 7
    expected = logits(plain, reader.adapter.lora)
    assert relative_error(logits(params, lora), expected) < 1e-5
    assert relative_error(expected, peft_logits(root / "adapter")) > 1e-3


def test_values_are_read_when_they_are_needed(root):
    base = open_reader(root / "base")
    lora = LoRA(RANK, 6.0, ("q_proj",), base_dtype="bfloat16")
    lazy = lazy_params(Adapted(base, NewAdapter(base.config, lora, {}, 0)), lora=lora, dtype="float32")
    assert {str(x.dtype) for x in lazy["stack0"].values()} == {"bfloat16", "float32"}
    assert lazy["embed_tokens"].dtype == "bfloat16" and lazy["stack0"]["q_proj_lora_a"].dtype == "float32"
