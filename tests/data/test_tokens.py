import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prom_jax.data import templates as prompts
from prom_jax.data.rows import Turn
from prom_jax.data.templates import Alpaca, Dialogue, Plain, Span
from prom_jax.data.tokens import encode
from prom_jax.tokenization import folder as tokenizers
from tests.tiny import sentencepiece_model

ENGLISH = prompts.wording("en")


def spans(*turns, words="en"):
    """In Alpaca's prompt."""
    return Alpaca(None).spans(Dialogue(turns, words))


def test_loss_on_the_response_alone(tokenizer):
    """An independent reading: prompt and whole text tokenised apart."""
    turn = Turn("Describe an input", "Habari ya asubuhi", "Nzuri sana")
    (side,) = encode(tokenizer, [spans(turn)], 1000)
    prompt = tokenizer(ENGLISH.prompt(turn.instruction, turn.input))["input_ids"]
    assert side.tokens[: len(prompt)].tolist() == prompt
    assert not side.loss[: len(prompt)].any()
    assert side.loss[len(prompt) :].all()  # from the first response token to EOS
    assert side.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(side.tokens[side.loss]) == "Nzuri sana</s>"
    assert side.bytes == len("Nzuri sana") and not side.truncated


def test_every_turn_ends_in_eos(tokenizer):
    turns = (Turn("Say hi", "", "Nzuri"), Turn("Again", "", "asante"))
    (side,) = encode(tokenizer, [spans(*turns)], 1000)
    assert (side.tokens == tokenizer.eos_token_id).sum() == 2
    assert tokenizer.decode(side.tokens[side.loss]) == "Nzuri</s>asante</s>"
    assert (side.tokens == tokenizer.bos_token_id).sum() == bool(tokenizer.bos_token)
    assert side.bytes == len("Nzuriasante")


def test_special_tokens_in_the_data_stay_text(byte_level):
    (side,) = encode(byte_level, [spans(Turn("a</s>b", "", "c</s>d"))], 1000)
    assert (side.tokens == byte_level.eos_token_id).sum() == 1
    assert byte_level.decode(side.tokens[side.loss][:-1]) == "c</s>d"


def test_token_across_the_boundary_bears_loss(byte_level):
    token = byte_level("asubuhi", return_offsets_mapping=True)
    assert len(token["input_ids"]) < len("asubuhi")  # some token spans several characters
    start = next(s for s, e in token["offset_mapping"] if e - s > 1) + 1
    (side,) = encode(byte_level, [[Span("asubuhi", ((start, 7),))]], 100)
    crossing = next(i for i, (s, e) in enumerate(token["offset_mapping"]) if s < start < e)
    assert side.loss.tolist() == [i >= max(crossing, 1) for i in range(len(side.tokens))]


def test_translation_source_is_cut_after_the_source(tokenizer):
    request = prompts.translation("Good morning", "Habari", "sw", "v", "en")
    both = (dataclasses.replace(request, learns="input"), request)
    source, whole = encode(tokenizer, [Alpaca(None).spans(text) for text in both], 1000)
    assert source.tokens.tolist() == whole.tokens[: len(source.tokens)].tolist()
    text = tokenizer.decode(source.tokens[source.loss])
    assert text.strip() == "Good morning" and source.bytes == len("Good morning")
    assert tokenizer.decode(source.tokens).endswith("Good morning")


def test_plain_text_and_bytes(byte_level, metaspace):
    text = "ภาษาไทย ok"
    (side,) = encode(byte_level, [prompts.plain(Plain(text))], 1000)
    assert side.loss.tolist() == [False] + [True] * (len(side.tokens) - 1)
    assert side.bytes == len(text.encode()) - 3  # nothing predicts the first character
    (side,) = encode(metaspace, [prompts.plain(Plain("Habari ya"))], 1000)
    assert side.tokens[0] == metaspace.bos_token_id
    assert side.loss.tolist() == [False] + [True] * (len(side.tokens) - 1)
    assert side.bytes == len("Habari ya")


def test_truncation_counts_what_is_kept(byte_level):
    text = spans(Turn("Say hi", "", "xyz" * 50))
    (whole,) = encode(byte_level, [text], 1000)
    (side,) = encode(byte_level, [text], len(whole.tokens) - 21)
    assert side.truncated and len(side.tokens) == len(whole.tokens) - 21
    assert side.bytes == len(byte_level.decode(side.tokens[side.loss]))
    assert side.tokens[-1] != byte_level.eos_token_id


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tokenizer of LLaMA-2's kind, loaded as its own is."""
    folder = tmp_path_factory.mktemp("llama")
    words = [prompts.wording(language) for language in ("en", "sw", "el")]
    lines = [text for w in words for text in (w.preamble, w.preamble_input, w.response, *w.translate)]
    lines += ["    indented", "        twice"] * 9
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(lines * 3, 700).SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return tokenizers.load(folder)


@pytest.fixture(params=["byte_level", "metaspace", "llama"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


# Letters with marks, an emoji of several characters, white space at the ends: whatever may meet a boundary.
texts = st.text(st.sampled_from("ab :#1.\n\t é́ก้ำக்য👩‍🌾</s>▁ "), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts, texts, texts, st.sampled_from(["en", "th", "ar", "sw", "ta"]))
def check_boundary(tokenizer, instruction, input, output, language):
    words = prompts.wording(language)
    turn = Turn(instruction, input, output)
    (side,) = encode(tokenizer, [spans(turn, words=language)], 4096)
    text = words.prompt(instruction, input) + output
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    bos = len(side.tokens) - len(encoded["input_ids"]) - 1
    assert side.tokens[bos:-1].tolist() == encoded["input_ids"]
    assert bos == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    start = len(text) - len(output)
    covers = [end > start for _, end in encoded["offset_mapping"]]
    assert side.loss.tolist() == [False] * bos + covers + [True]
    assert side.loss[-1] and side.tokens[-1] == tokenizer.eos_token_id
    first = covers.index(True)
    assert encoded["offset_mapping"][first][0] <= start < encoded["offset_mapping"][first][1]
    assert not any(covers[:first]) and all(covers[first:])
    assert side.bytes == len(output.encode()) and side.words == len(output.split())


def test_the_boundary_is_exact(any_tokenizer):
    """Of any text in any prompt: what covers a character of the response bears loss, from its first token to
    EOS, and nothing before."""
    check_boundary(any_tokenizer)
