from prom_jax.data import prompts
from prom_jax.data.prompts import Span
from prom_jax.data.sources import Turn
from prom_jax.data.tokens import encode

ENGLISH = prompts.wording("en")


def test_loss_on_the_response_alone(tokenizer):
    """An independent reading: prompt and whole text tokenised apart."""
    turn = Turn("Describe an input", "Habari ya asubuhi", "Nzuri sana")
    (side,) = encode(tokenizer, [prompts.conversation((turn,), ENGLISH)], 1000)
    prompt = tokenizer(ENGLISH.prompt(turn.instruction, turn.input))["input_ids"]
    assert side.tokens[: len(prompt)].tolist() == prompt
    assert not side.loss[: len(prompt)].any()
    assert side.loss[len(prompt) :].all()  # from the first response token to EOS
    assert side.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(side.tokens[side.loss]) == "Nzuri sana</s>"
    assert side.bytes == len("Nzuri sana") and not side.truncated


def test_every_turn_ends_in_eos(tokenizer):
    turns = (Turn("Say hi", "", "Nzuri"), Turn("Again", "", "asante"))
    (side,) = encode(tokenizer, [prompts.conversation(turns, ENGLISH)], 1000)
    assert (side.tokens == tokenizer.eos_token_id).sum() == 2
    assert tokenizer.decode(side.tokens[side.loss]) == "Nzuri</s>asante</s>"
    assert (side.tokens == tokenizer.bos_token_id).sum() == bool(tokenizer.bos_token)
    assert side.bytes == len("Nzuriasante")


def test_special_tokens_in_the_data_stay_text(byte_level):
    (side,) = encode(byte_level, [prompts.conversation((Turn("a</s>b", "", "c</s>d"),), ENGLISH)], 1000)
    assert (side.tokens == byte_level.eos_token_id).sum() == 1
    assert byte_level.decode(side.tokens[side.loss][:-1]) == "c</s>d"


def test_token_across_the_boundary_bears_loss(byte_level):
    token = byte_level("asubuhi", return_offsets_mapping=True)
    assert len(token["input_ids"]) < len("asubuhi")  # some token spans several characters
    start = next(s for s, e in token["offset_mapping"] if e - s > 1) + 1
    (side,) = encode(byte_level, [[Span("asubuhi", start, 7)]], 100)
    crossing = next(i for i, (s, e) in enumerate(token["offset_mapping"]) if s < start < e)
    assert side.loss.tolist() == [i >= max(crossing, 1) for i in range(len(side.tokens))]


def test_translation_source_is_cut_after_the_source(tokenizer):
    args = ("Good morning", "Habari", "sw", "v", ENGLISH)
    source, whole = encode(tokenizer, [prompts.translation_source(*args), prompts.translation(*args)], 1000)
    assert source.tokens.tolist() == whole.tokens[: len(source.tokens)].tolist()
    text = tokenizer.decode(source.tokens[source.loss])
    assert text.strip() == "Good morning" and source.bytes == len("Good morning")
    assert tokenizer.decode(source.tokens).endswith("Good morning")


def test_plain_text_and_bytes(byte_level, metaspace):
    text = "ภาษาไทย ok"
    (side,) = encode(byte_level, [prompts.plain(text)], 1000)
    assert side.loss.tolist() == [False] + [True] * (len(side.tokens) - 1)
    assert side.bytes == len(text.encode()) - 3  # nothing predicts the first character
    (side,) = encode(metaspace, [prompts.plain("Habari ya")], 1000)
    assert side.tokens[0] == metaspace.bos_token_id
    assert side.loss.tolist() == [False] + [True] * (len(side.tokens) - 1)
    assert side.bytes == len("Habari ya")


def test_truncation_counts_what_is_kept(byte_level):
    spans = prompts.conversation((Turn("Say hi", "", "xyz" * 50),), ENGLISH)
    (whole,) = encode(byte_level, [spans], 1000)
    (side,) = encode(byte_level, [spans], len(whole.tokens) - 21)
    assert side.truncated and len(side.tokens) == len(whole.tokens) - 21
    assert side.bytes == len(byte_level.decode(side.tokens[side.loss]))
    assert side.tokens[-1] != byte_level.eos_token_id
