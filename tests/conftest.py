"""Eight virtual CPU devices and exact float32 products for the whole suite; two small tokenizers: byte-level
BPE without BOS, and a SentencePiece-like one with BOS that marks the start of a text alone with a space, as
LLaMA-2's does; and a tiny model with data to train it on."""

import gc
import os
import tempfile
from pathlib import Path

# Compiling is most of the suite's time: with the simplest code it takes an eighth.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# The emulator of an object store does not tell what kind of bucket it has.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# The same small programs are compiled again and again, in this process, its workers and what these start.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="prom_jax_tests_")

import jax
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import prom_jax
from tests.tiny import make, tiny_config

jax.config.update("jax_default_matmul_precision", "highest")

MOST_MAPS = 25_000  # that tests may leave behind

CORPUS = [
    "Below is an instruction that describes a task, paired with an input.",
    "Write a response that appropriately completes the request. ### Instruction: Response: Input:",
    "Habari ya asubuhi? Nzuri sana, asante. สวัสดีครับ ภาษาไทย ภาษาไทย",
] * 3


def train(model, pre_tokenizer, alphabet):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def pytest_collection_modifyitems(items):
    """The longest test comes first, so that two workers end together."""
    items.sort(key=lambda item: "main_job" not in item.keywords)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_freed():
    """Each takes memory maps, of which a process has 65,530; past them it ends by a segmentation fault. To
    free them takes seconds, and what is freed is compiled again: only where there are many."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def byte_level():
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = train(models.BPE(), split, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def metaspace():
    split = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    alphabet = [chr(c) for c in range(33, 127)] + ["\n", "▁"]
    tokenizer = train(models.BPE(unk_token="<unk>"), split, alphabet)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(params=["byte_level", "metaspace"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, byte_level):
    """A folder with a small model and data, as `tests.tiny.make` leaves it."""
    return make(tmp_path_factory.mktemp("tiny"), byte_level)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M as ours, its tokenizer, the folder of its export, and transformers' model of that."""
    path = os.environ.get("SMOLLM2")
    if not path:
        pytest.skip("SMOLLM2 does not name the .gguf file; bash tests/run.sh -m slow does so")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    model, tokenizer = prom_jax.load(path)
    prom_jax.save_hf(model, tokenizer, folder)
    return model, tokenizer, folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def gemma3():
    """Gemma-3-270M as ours, its tokenizer, and the path of its .gguf file."""
    path = os.environ.get("GEMMA3")
    if not path:
        pytest.skip("GEMMA3 does not name the .gguf file; bash launch/model.sh gemma fetches it")
    model, tokenizer = prom_jax.load(path)
    return model, tokenizer, Path(path)


@pytest.fixture
def config(tiny):
    """Eight steps of PROM, as short as they can be."""
    return tiny_config(tiny)
