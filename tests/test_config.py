"""Every configuration, its variants, and what they say of the paper."""

import importlib.util
import json
from pathlib import Path

import pytest

from prom_jax import config as configuration
from prom_jax.utils.config_file import load as config_file
from prom_jax.utils.config_file import override
from prom_jax.utils.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
LANGUAGES = ("ar", "bn", "el", "ml", "mr", "sw", "ta", "te", "th")


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path, variant=""):
    return module_of(path).get_config(variant)


def test_there_is_one_file_a_language():
    assert {path.stem for path in CONFIGS} == {*LANGUAGES, "demo", "gemma", "study"}


@pytest.mark.parametrize("variant", configuration.VARIANTS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_variant_is_valid(path, variant):
    config = load(path, variant)
    configuration.check(config)
    assert not config.eval.text  # no default names a source for evaluation


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_papers_values(language):
    config = load(Path(f"configs/{language}.py"))
    assert config.language == language and config.model == "meta-llama/Llama-2-7b-hf"
    assert (config.pivot.weight, config.pivot.label_smoothing, config.pivot.norm) == (0.1, 0.1, "none")
    assert (config.batch.sequences, config.data.seq_len) == (32, 1024)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_ratio, optimizer.epochs) == (2e-5, 0.03, 3.0)
    assert (optimizer.schedule, optimizer.weight_decay, optimizer.clip) == ("cosine", 0.0, 1.0)
    assert config.pivot.regulate == "auto"


def test_the_published_script():
    config = load(Path("configs/th.py"), "published")
    assert (config.pivot.layer, config.pivot.english_prompt, config.pivot.translation_source) == (
        23, "target", True,
    )  # fmt: skip
    assert (config.optimizer.schedule, config.optimizer.clip, config.data.seq_len) == ("linear", 0.0, 2048)


def test_thai_has_the_rows_of_table_4():
    module, rows = module_of(Path("configs/th.py")), set()
    for variant in ("bactrian", *module.ABLATION):
        config = module.get_config(variant)
        pivot = config.pivot
        rows.add((config.method, pivot.layer or 24, pivot.label_smoothing, pivot.weight))
    assert rows == {
        ("bactrian", 24, 0.1, 0.1),
        *(("prom", 24, smoothing, 0.1) for smoothing in (0.0, 0.03, 0.3)),
        *(("prom", layer, 0.1, 0.1) for layer in (22, 23, 25, 26)),
        *(("prom", 24, 0.1, weight) for weight in (0.3, 0.5, 1.0)),
    }


def test_every_key_can_be_overridden_and_keeps_its_type():
    overrides, expected = [], {}

    def collect(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}.{key}")
            else:
                other = {str: "other", float: 0.25, int: 7, bool: not value}.get(type(value), "a.jsonl")
                overrides.append(f"{prefix}.{key}={other}")
                expected[f"{prefix}.{key}"] = [other] if isinstance(value, list) else other

    collect(json.loads(load(Path("configs/demo.py")).to_json()), "--config")
    result = json.loads(override(config_file("configs/demo.py"), overrides).to_json())
    for path, value in expected.items():
        node = result
        for key in path.split(".")[1:]:
            node = node[key]
        assert node == value, path


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("batch.accumulation", 0, "batch.accumulation=0: expected 1 or more"),
        ("optimizer.learning_rate", -1.0, "optimizer.learning_rate=-1.0"),
        ("optimizer.schedule", "step", "optimizer.schedule='step': expected one of 'cosine', 'linear'"),
        ("optimizer.warmup_ratio", 2.0, "expected a share"),
        ("export.dtype", "int8", "export.dtype='int8'"),
        ("adapter.rank", 0, "adapter.rank=0: expected 1 or more"),
        ("adapter.dropout", 1.0, "adapter.dropout=1.0: expected a share"),
        ("adapter.base_dtype", "nf4", "adapter.base_dtype='nf4' is of frozen parameters"),
    ],
)
def test_values_that_no_run_could_use(key, value, message):
    config = load(Path("configs/demo.py"))
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        configuration.check(config)


def test_variants_are_joined():
    config = load(Path("configs/th.py"), "bactrian+qlora")
    assert (config.method, config.adapter.kind, config.adapter.base_dtype) == ("bactrian", "lora", "nf4")
    assert config.optimizer.learning_rate == 2e-4
    assert load(Path("configs/th.py"), "weight_1+lora").pivot.weight == 1.0


def test_an_unknown_variant_is_named():
    with pytest.raises(UserError, match=r"unknown variant 'bactrain': expected one of bactrian"):
        load(Path("configs/th.py"), "bactrain")
