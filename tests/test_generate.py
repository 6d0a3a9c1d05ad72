"""The command that answers a prompt, talks, and answers a file."""

import json
import os
import shutil
import signal
import threading

import pytest

import prom_jax
from prom_jax import generate
from prom_jax.checkpoints.pretrained import load_tokenizer
from prom_jax.data.templates import wording
from prom_jax.evaluation.decode import greedy
from prom_jax.evaluation.talk import ctrl_c_sets, readable
from prom_jax.utils.errors import UserError
from tests.tiny import sentencepiece_model


def expected(model, tokenizer, prompt, length):
    (answer,) = greedy(model, [tokenizer(prompt)["input_ids"]], length, [tokenizer.eos_token_id])
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_streams_the_greedy_answer(tiny, tmp_path, capsys):
    model, tokenizer = prom_jax.load(tiny / "model")
    for flags, prompt in ((["--raw"], "maziwa"), ([], wording("en").prompt("maziwa"))):
        generate.main(["maziwa", f"--model={tiny / 'model'}", "--max_new_tokens=21", *flags])
        assert capsys.readouterr().out == expected(model, tokenizer, prompt, 21).rstrip("\ufffd") + "\n"

    # A model that was trained here is asked in the language of its prompts.
    shutil.copytree(tiny / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prom_jax": {"prompts": "sw"}}))
    generate.main(["maziwa", f"--model={tmp_path / 'model'}", "--max_new_tokens=9"])
    answer = expected(model, tokenizer, wording("sw").prompt("maziwa"), 9)
    assert capsys.readouterr().out == answer.rstrip("\ufffd") + "\n"


def test_half_a_character_waits(byte_level, capsys):
    show = generate.Stream()
    tokens = byte_level("สวัสดี ใช่")["input_ids"]
    for end in range(1, len(tokens) + 1):
        assert show(0, readable(byte_level, tokens[:end])) is False
    assert capsys.readouterr().out == "สวัสดี ใช่"


def test_nothing_is_printed_again(tmp_path, capsys):
    """Bytes of half a character make those of whole ones before it unreadable."""
    model = sentencepiece_model(["a b ab", "b a"] * 9, 300, hard_vocab_limit=False)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    for text in ("తెలుగు భాష", "ab 😀👩‍👧 é", "a\ufffdb"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for step in (1, 2, 4):
            show = generate.Stream()
            for end in (*range(step, len(tokens), step), len(tokens)):
                show(0, readable(tokenizer, tokens[:end]))
            assert capsys.readouterr().out == text


def test_a_prompt_never_ends_with_eos(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    (eos,) = (token for token in content["added_tokens"] if token["content"] == "</s>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": eos["content"], "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            eos["content"]: {"id": eos["content"], "ids": [eos["id"]], "tokens": [eos["content"]]}
        },
    }
    path.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "model")("maziwa")["input_ids"][-1] == eos["id"]
    answers = set()
    for model in (tiny / "model", tmp_path / "model"):
        generate.main(["maziwa", f"--model={model}", "--raw", "--max_new_tokens=9"])
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["", "--raw"], "has 0 tokens: expected 1 to 768"),
        (["a " * 900, "--raw"], "expected 1 to 768, which leaves 256"),
        (["a", "--max_new_tokens=0"], "--max_new_tokens=0"),
        ([], "expected one of a prompt, --interactive and --prompts"),
        (["a", "--interactive"], "expected one of a prompt"),
        (["a", "--out=x"], "go together"),
        (["--interactive", "--raw"], "--raw continues one text"),
        (["a", "--template=model"], "has no chat template of its own"),
        (["a", "--template=alpaca"], "invalid choice"),
    ],
)
def test_bad_input(tiny, flags, message):
    with pytest.raises(UserError, match=message):
        generate.main([*flags, f"--model={tiny / 'model'}"])


# Conversations and comparisons.

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """The tiny model with a chat template of its own."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(tiny / "model", folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def test_a_template_of_the_models_own(chatty, capsys):
    model, tokenizer = prom_jax.load(chatty)
    for template, prompt in (
        ("auto", "<user>maziwa<assistant>"),
        ("model", "<user>maziwa<assistant>"),
        ("training", wording("en").prompt("maziwa")),
    ):
        generate.main(["maziwa", f"--model={chatty}", "--max_new_tokens=7", f"--template={template}"])
        answer = expected(model, tokenizer, prompt, 7)
        assert capsys.readouterr().out.startswith(answer.rstrip("\ufffd"))


def test_a_conversation(chatty, monkeypatch, capsys):
    said = ["maziwa 牛", "  ", "nyasi", "/new", "nyasi", "x" * 3000]

    def read(_):
        if not said:
            raise EOFError
        return said.pop(0)

    monkeypatch.setattr("builtins.input", read)
    generate.main([f"--model={chatty}", "--interactive", "--max_new_tokens=8"])
    model, tokenizer = prom_jax.load(chatty)
    answer = lambda prompt: readable(
        tokenizer, greedy(model, [tokenizer(prompt)["input_ids"]], 8, [tokenizer.eos_token_id])[0]
    )
    first = answer("<user>maziwa 牛<assistant>")
    second = answer(f"<user>maziwa 牛<assistant>{first}<user>nyasi<assistant>")
    anew = answer("<user>nyasi<assistant>")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{generate.HELP}\n{first}\n{second}\n{anew}\nThe conversation has")
    assert printed.endswith("/new begins another one\n\n")


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, which it does not where a shell began the tests in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(chatty, capsys, interruptible):
    talker = generate.Talker(chatty, template="auto", max_new_tokens=600, sampling={})
    generate.load([talker], generate.parse([f"--model={chatty}", "--interactive"]))
    prompt = talker.conversation([{"role": "user", "content": "maziwa"}])
    ((_, whole),) = talker.answers([prompt])
    stop = threading.Event()
    with ctrl_c_sets(stop):
        os.kill(os.getpid(), signal.SIGINT)
        (text,) = generate.answer([talker], [prompt], stop)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert whole.startswith(text) and len(text) < len(whole)
    assert capsys.readouterr().out == text + "\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_answers_side_by_side(tiny, chatty, capsys):
    generate.main(["maziwa", f"--model={chatty}", f"--compare={tiny / 'model'}", "--max_new_tokens=5"])
    printed = capsys.readouterr().out
    talkers = [
        generate.Talker(source, template="auto", max_new_tokens=5, sampling={})
        for source in (chatty, tiny / "model")
    ]
    row = "".join(printed.split())
    for talker in talkers:
        generate.load([talker], generate.parse([f"--model={chatty}", "--interactive"]))
        ((_, text),) = talker.answers([talker.conversation([{"role": "user", "content": "maziwa"}])])
        assert all(word in row for word in text.split())


# Files.


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    rows = [{"id": n, "prompt": f"maziwa {'nyasi ' * (n % 4)}{n}"} for n in range(11)]
    rows.append({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    rows[-1]["messages"].append({"role": "user", "content": "c"})
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path, rows


@pytest.mark.parametrize(
    "sampled", [[], ["--temperature=0.8", "--top_p=0.9", "--seed=3"]], ids=["greedy", "drawn"]
)
def test_a_file_goes_on_where_it_was(chatty, prompts, tmp_path, capsys, sampled):
    path, rows = prompts
    flags = [f"--model={chatty}", f"--prompts={path}", "--max_new_tokens=6", *sampled]
    out, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    kept = []
    unlink = type(out).unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(out), "unlink", lambda self: (kept.append(self.read_text()), unlink(self)))
        generate.main([*flags, f"--out={out}"])
    found = lines(out)
    assert [{key: row[key] for key in row if key != "answer"} for row in found] == rows
    assert len({row["answer"] for row in found}) > 1 and not out.with_name("out.jsonl.part").exists()

    parts = kept[0].splitlines(keepends=True)
    again.with_name("again.jsonl.part").write_text("".join(parts[:6]) + parts[6][:9])  # a kill within a line
    capsys.readouterr()
    generate.main([*flags, f"--out={again}"])
    assert "kept      5 of 12 answers" in capsys.readouterr().out
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        generate.main([*flags, f"--out={again}"])


def test_other_settings_do_not_go_on(chatty, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = [f"--model={chatty}", f"--prompts={prompts[0]}", f"--out={out}", "--max_new_tokens=6"]
    generate.main(flags)
    out.rename(out.with_name("moved"))
    (tmp_path / "out.jsonl.part").write_text(json.dumps({"settings": {"max_new_tokens": 5}}) + "\n")
    with pytest.raises(UserError, match=r"out.jsonl.part holds answers with model 1=None, now '\w+-\w+'"):
        generate.main(flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"prompt": "a"}\n{"promt": "a"}', 'line 2 .*expected {"prompt": '),
        (b'{"messages": [{"role": "user"}]}', "line 1 .*no list `messages`"),
        (b"[" * 100_000, "line 1"),
        (b"3", "line 1"),
        (b'{"prompt": "a", "answer": "b"}', "row 1 has 'answer' already"),
        (b'{"prompt": "%s"}' % (b"a " * 1200), "row 1 has .* tokens: expected 1 to"),
    ],
)
def test_bad_files_of_prompts(chatty, tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        generate.main([f"--model={chatty}", f"--prompts={path}", f"--out={tmp_path / 'out.jsonl'}"])
    assert not (tmp_path / "out.jsonl").exists()
