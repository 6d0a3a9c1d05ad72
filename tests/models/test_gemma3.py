"""Gemma-3-270M, its real weights, against transformers' reading of the same file: layers, logits, answers and
export.

Its window is 512 tokens: texts are shorter and longer than it by far.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prom_jax
from prom_jax.evaluation.decode import greedy
from prom_jax.models import decoder
from prom_jax.training.methods.prom import PROM
from tests.models.test_decoder import MAX_ERROR, MAX_TOKEN_ERROR, TEXT, hf_forward, worst_errors
from tests.reference import gradients, pack, to_model
from tests.tokenization.made_up import TEXTS
from tests.training.test_methods import assert_same, copied_head, torch_loss

PROMPTS = [
    "The capital of Kenya is",
    "Water boils at 100 degrees because",
    "Once upon a time, in a village by the sea,",
    "عاصمة مصر هي",
    "كان يا ما كان في قديم الزمان",
    "Η πρωτεύουσα της Ελλάδας είναι",
    "Ο ήλιος ανατέλλει από",
    "Μια φορά κι έναν καιρό",
    "เมืองหลวงของประเทศไทยคือ",
    "กาลครั้งหนึ่งนานมาแล้ว",
]
NEW = 64
COLUMNS = 16_384  # of the logits that are compared at once: copies of all of them take gigabytes


# Of the ids that the model's own tokenizer.json gives to `hard_texts`.
DIGEST = "35e6c921d0d71578ea3b777ffae73472529d12821861a4744d93de7e9fefc1bc"


def hard_texts():
    """Runs of white space, tokens spelled out or nearly so, characters of many scripts at random."""
    runs = [f"a{character * n}b" for character in (" ", "\n", "\t", " \n") for n in range(70)]
    spelled = [
        "<bos>hi<eos>", "<start_of_turn>user\nhi<end_of_turn>\n", "<unused99><unused62420>", "<td>x</td>",
        "[multimodal]<mask><unk><pad>", "<0x0A> <0x41>", "▁▁ ▁ a▁b", "< bos > <bo",
        "\0\1\x7f\U0010ffff",
    ]  # fmt: skip
    alphabet = " \t\n aeiou.,0123456789<>ก้าสεληعرب😀▁\u0301\u200d\u00a0é½²"
    chance = np.random.default_rng(0)
    return [
        *TEXTS, *runs, *spelled,
        *("".join(chance.choice(list(alphabet), length)) for length in chance.integers(1, 60, 2000)),
    ]  # fmt: skip


@pytest.mark.slow
def test_ids_are_those_of_its_own_tokenizer(gemma3):
    ids = gemma3[1](hard_texts())["input_ids"]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == DIGEST


@pytest.fixture(scope="module")
def theirs(gemma3):
    path = gemma3[-1]
    hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return hf.eval()


def long_text(tokenizer, length):
    ids = tokenizer(TEXT + TEXT[::-1])["input_ids"]
    assert len(ids) >= length
    return np.array([ids[:length]])


def errors_of_logits(ours, theirs):
    """As `worst_errors`: of an element, relative to the largest, and of a token, in L2."""
    squares = np.zeros((2, ours.shape[1]))
    difference = largest = 0.0
    for start in range(0, ours.shape[-1], COLUMNS):
        a, b = (np.asarray(x[0, :, start : start + COLUMNS], np.float64) for x in (ours, theirs))
        squares += ((a - b) ** 2).sum(-1), (b**2).sum(-1)
        difference, largest = max(difference, np.abs(a - b).max()), max(largest, np.abs(b).max())
    return difference / largest, np.sqrt(squares[0] / squares[1]).max()


@pytest.mark.slow
@pytest.mark.parametrize("length", [600, 1500])
def test_layers_and_logits(gemma3, theirs, length):
    model, tokenizer, _ = gemma3
    assert decoder.num_parameters(model) == 268_098_176
    tokens = long_text(tokenizer, length)
    states, logits = hf_forward(theirs, tokens)
    errors = {"states": worst_errors(model.hidden_states(tokens), states)}
    errors["logits"] = errors_of_logits(model(tokens), logits)
    for what, (error, token_error) in errors.items():
        print(f"gemma3, {length} tokens: {what} {error:.1e} / {token_error:.1e} (element / token)")
    for error, token_error in errors.values():
        assert error <= MAX_ERROR
        assert token_error <= MAX_TOKEN_ERROR


@pytest.mark.slow
def test_greedy_answers(gemma3, theirs):
    model, tokenizer, _ = gemma3
    prompts = tokenizer(PROMPTS)["input_ids"]
    ours = greedy(model, prompts, NEW, [])
    for prompt, new in zip(prompts, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert tokenizer.decode(new) == tokenizer.decode(expected[0, len(prompt) :])
        assert new == expected[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "final"])
def test_loss_and_gradients_of_an_update(gemma3, norm):
    """PROM's, of texts of which one is longer than the window, on the model that transformers reads. torch
    computes in float64: in float32 its own gradients of this model are wrong by 1.3e-3."""
    _, tokenizer, path = gemma3
    hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    del hf.config.quantization_config  # of the file, not of the model as it is now
    method = PROM(14, weight=0.1, label_smoothing=0.1, norm=norm)
    ids = np.concatenate([tokenizer(text)["input_ids"] for text in [TEXT, *PROMPTS] * 3])

    def examples(*lengths):
        for start, length in enumerate(lengths):
            weights = np.zeros(length, np.float32)
            weights[-40:-1] = 1  # the answer
            yield ids[start : start + length], weights

    target, english = list(examples(700, 200)), list(examples(120, 90))
    head = copied_head(hf)
    rows = {"target": pack(target, [[0, 1]], 900), "english": pack(english, [[0, 1]], 210)}
    model = to_model(hf, method.layer, head.weight)
    ours = gradients(model, method, rows, chunk=64)
    del model
    theirs = torch_loss(hf.double(), head.double(), method, target=target, english=english)
    assert_same(ours, theirs, tolerance=1e-4)


@pytest.mark.slow
def test_its_export_loads_in_transformers(gemma3, theirs, tmp_path):
    model, tokenizer, _ = gemma3
    prom_jax.save_hf(model, tokenizer, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert type(exported).__name__ == "Gemma3ForCausalLM"
    tokens = torch.from_numpy(long_text(tokenizer, 600))
    with torch.no_grad():
        error, token_error = errors_of_logits(exported(tokens).logits.numpy(), theirs(tokens).logits.numpy())
    print(f"gemma3, its export in transformers: logits {error:.1e} / {token_error:.1e} (element / token)")
    assert error <= MAX_ERROR / 10
    assert token_error <= MAX_TOKEN_ERROR / 10
    again, again_tokenizer = prom_jax.load(tmp_path / "hf")
    assert again.config == model.config
    texts = [*PROMPTS, TEXT]
    ids = tokenizer(texts)["input_ids"]
    assert again_tokenizer(texts)["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(texts)["input_ids"] == ids
