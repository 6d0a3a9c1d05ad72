"""Google's real client against a local server that speaks the service's JSON; NLLB against transformers."""

import contextlib
import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prom_jax.data.rows import Row, Turn
from prom_jax.data.translation import engines, translate
from prom_jax.data.translation.engines import NLLB, Google
from prom_jax.data.translation.translate import Cache
from prom_jax.utils.errors import UserError
from tests.data.translation.test_translate import spell_thai

TOKEN = "ya29.a-secret-that-must-not-leak"


class Service(http.server.ThreadingHTTPServer):
    """POST /v3/{parent}:translateText. `script` holds what to do with the next requests: (status, message), a
    number of seconds to be silent, or "hang up"; after that every request succeeds."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.headers, self.paths = [], [], [], []
        self.retry_after, self.delay, self.lock = None, 0.0, threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    @property
    def sent(self):
        return [text for request in self.requests for text in request["contents"]]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        service = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            service.requests.append(request)
            service.headers.append({name.lower(): value for name, value in self.headers.items()})
            service.paths.append(self.path.partition("?")[0])
            step = service.script.pop(0) if service.script else service.delay
        if step == "hang up":
            self.connection.close()
            return
        if isinstance(step, tuple):
            code, message = step
            self.answer(code, {"error": {"code": code, "message": message, "status": "SOME_STATUS"}})
            return
        time.sleep(step)
        translations = [{"translatedText": spell_thai(text)} for text in request["contents"]]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.answer(200, {"translations": translations})

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.server.retry_after and code != 200:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engines, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(engines, "LONGEST_WAIT", 0.05)
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield service
        service.shutdown()
        thread.join()


@pytest.fixture
def google(service):
    return Google("th", project="my-project", endpoint=service.endpoint)


def test_the_request_is_the_documented_one(service, google):
    assert google.translate(["One.", "Two."]) == [spell_thai("One."), spell_thai("Two.")]
    assert service.paths == ["/v3/projects/my-project/locations/global:translateText"]
    assert service.requests == [
        {
            "contents": ["One.", "Two."],
            "mimeType": "text/plain",
            "sourceLanguageCode": "en",
            "targetLanguageCode": "th",
        }
    ]


def test_plain_http_is_sent_no_credentials(service, google):
    google.translate(["One."])
    assert "authorization" not in service.headers[0]


def test_a_regional_host_gets_its_own_location():
    google = Google("th", project="p", endpoint="translate-eu.googleapis.com", credentials=credentials())
    assert google._request["parent"] == "projects/p/locations/europe-west1"
    assert google._client.transport._host == "https://translate-eu.googleapis.com"


@pytest.mark.parametrize(
    "failures",
    [
        [(429, "Quota exceeded"), (429, "Quota exceeded")],
        [(500, "Internal"), (502, "Bad gateway"), (503, "Unavailable"), (504, "Deadline")],
        [(403, "User Rate Limit Exceeded")],
        ["hang up"],
        [0.5],
    ],
)
def test_passing_failures_are_waited_out(service, google, failures, monkeypatch):
    monkeypatch.setattr(engines, "TIMEOUT", 0.2)
    service.script = list(failures)
    assert google.translate(["One."]) == [spell_thai("One.")]
    assert len(service.requests) == len(failures) + 1


def test_retry_after_is_heeded(service, google, monkeypatch):
    monkeypatch.setattr(engines, "LONGEST_WAIT", 0.4)  # the most it waits, whatever the service says
    service.script, service.retry_after = [(429, "Quota exceeded")], "3"
    start = time.monotonic()
    google.translate(["One."])
    assert 0.4 <= time.monotonic() - start < 2


def test_patience_ends(service, google, monkeypatch):
    monkeypatch.setattr(engines, "PATIENCE", 0.2)
    service.script = [(503, "Unavailable")] * 100
    with pytest.raises(UserError, match=r"'my-project': no success in 0 seconds.*ServiceUnavailable.*later"):
        google.translate(["One."])
    assert len(service.requests) > 1


@pytest.mark.parametrize(
    "code, message, expected",
    [
        (403, "Cloud Translation API has not been used", "enable the Cloud Translation API"),
        (403, "Daily Limit Exceeded", "higher quota"),
        (404, "Requested entity\nwas not found.", "not found.*check --project"),
        (400, "Target language is invalid.", "language is invalid.*check the language code"),
        (401, "Invalid credentials", "gcloud auth application-default login"),
    ],
)
def test_what_retrying_cannot_fix(service, google, code, message, expected):
    service.script = [(code, message)]
    with pytest.raises(UserError, match=expected) as error:
        google.translate(["One."])
    assert "\n" not in str(error.value) and len(service.requests) == 1


def test_requests_keep_to_the_quota(service):
    google = Google("th", project="p", endpoint=service.endpoint, characters_per_minute=6000)  # 100 a second
    start = time.monotonic()
    for text in ("a" * 30, "b" * 20, "c"):
        google.translate([text])
    assert 0.5 <= time.monotonic() - start < 2


def test_without_credentials(monkeypatch, tmp_path):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(UserError, match="no Google Cloud credentials"):
        Google("th")


def credentials():
    from google.oauth2.credentials import Credentials

    return Credentials(token=TOKEN)


def test_credentials_leak_nowhere(service, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    google = Google("th", project="p", endpoint=service.endpoint, credentials=credentials())
    path = tmp_path / "cache.sqlite"
    cache = Cache(path)
    rows = [Row("1", (Turn("One line.", "", "Two lines."),))]
    service.script = [(503, "Unavailable")]
    translate.translate(rows, google, cache, "th")
    assert service.headers[-1]["authorization"] == f"Bearer {TOKEN}"  # sent: there is something to leak
    service.script = [(403, f"Account with {TOKEN} may not")]
    with pytest.raises(UserError) as error:
        google.translate(["Three."])
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert spell_thai("One line.").encode() in stored
    cache.close()
    out = capfd.readouterr()
    for place in (str(error.value), repr(error.value.__cause__), out.out, out.err, caplog.text):
        assert TOKEN not in place
    assert all(TOKEN not in str(vars(record)) for record in caplog.records)
    assert TOKEN.encode() not in stored and TOKEN not in google.name


RUN = """
import sys
from prom_jax.data.translation import translate
from prom_jax.data.translation.engines import Google
from prom_jax.data.rows import Row, Turn

Google.max_texts, Google.workers = 2, 3
rows = [Row(str(i), (Turn(f"Say {'x' * i}.", "", ""),)) for i in range(40)]
cache = translate.Cache(sys.argv[2])
result = translate.translate(rows, Google("th", project="p", endpoint=sys.argv[1]), cache, "th")
print(len(result.rows), len(result.rejected))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_without_paying_twice(service, tmp_path):
    command = [sys.executable, "-c", RUN, service.endpoint, str(tmp_path / "cache.sqlite")]
    environment = {**os.environ, "PYTHONPATH": str(Path(engines.__file__).parents[3])}
    service.delay = 0.1
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    while len(service.requests) < 9:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    service.delay = 0.0
    with contextlib.closing(Cache(tmp_path / "cache.sqlite")) as cache:
        stored = set(cache.get(("google", "en", "th"), service.sent))
    before = len(service.requests)
    assert stored and len(service.sent) - len(stored) <= 3 * 2  # in flight: a request of two texts a worker
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    again = {text for request in service.requests[before:] for text in request["contents"]}
    assert not again & stored
    assert len(service.sent) == 40 + before * 2 - len(stored)
    assert sum(map(int, second.stdout.split())) == 40


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.translate_v3", None)
    with pytest.raises(UserError, match=r"pip install .*\[translate\]'"):
        Google("th", project="p")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match=r"pip install .*\[translate\]'"):
        NLLB("th", "model")


# NLLB -----------------------------------------------------------------------------------------

CODES = "ace_Arab arb_Arab ary_Arab bod_Tibt eng_Latn est_Latn kor_Hang lvs_Latn npi_Deva pes_Arab".split()
CODES += "prs_Arab swh_Latn tha_Thai zho_Hans zho_Hant".split()


def test_a_conversion_on_the_hub_is_fetched_and_its_licence_said(monkeypatch, tmp_path, capsys):
    calls = []

    def snapshot_download(name, revision):
        calls.append((name, revision))
        if revision == "gone":
            raise OSError("404 Client Error")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for model, expected in (("own/nllb-ct2@v1", ("own/nllb-ct2", "v1")), ("own/nllb", ("own/nllb", None))):
        with pytest.raises(UserError, match="is a model that is not converted"):
            NLLB("th", model)
        assert calls[-1] == expected and "non-commercial" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"own/nllb@gone cannot be fetched \(OSError: 404 Client"):
        NLLB("th", "own/nllb@gone")
    with pytest.raises(UserError, match="is no folder with a converted model"):
        NLLB("th", f"{tmp_path}/nllb-ct2")
    assert len(calls) == 3


@pytest.fixture(scope="session")
def nllb(tmp_path_factory):
    """(transformers folder, converted folder) of a random model with NLLB's architecture and tokenizer."""
    import ctranslate2
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(
        ["The cat sat. A dog ran to the big house! Was it so? แมว นั่ง หมา วิ่ง"], trainer
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = NllbTokenizer(
        vocab=model["vocab"], merges=merges, additional_special_tokens=CODES, src_lang="eng_Latn"
    )
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=1024,
        scale_embedding=True,
        init_std=0.5,  # far from uniform: one token wins clearly
    )
    folder = tmp_path_factory.mktemp("nllb")
    M2M100ForConditionalGeneration(config).save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    converter = ctranslate2.converters.TransformersConverter(
        str(folder / "hf"), copy_files=["tokenizer.json", "tokenizer_config.json"]
    )
    converter.convert(str(folder / "ct2"))
    return folder / "hf", folder / "ct2"


def by_transformers(folder, text, code, tokens):
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, src_lang="eng_Latn")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model.generate(
            **tokenizer(text, return_tensors="pt"),
            forced_bos_token_id=tokenizer.convert_tokens_to_ids(code),
            num_beams=1,
            do_sample=False,
            max_new_tokens=tokens,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)


@pytest.mark.parametrize("language, code", [("th", "tha_Thai"), ("sw", "swh_Latn")])
def test_nllb_is_transformers(nllb, monkeypatch, language, code):
    monkeypatch.setattr(engines, "BEAMS", 1)
    monkeypatch.setattr(engines, "MAX_TOKENS", 12)
    texts = ["The cat sat.", "A dog ran to the big house!", "Was it so?"]
    expected = [by_transformers(nllb[0], text, code, 12) for text in texts]
    assert NLLB(language, str(nllb[1]), device="cpu").translate(texts) == expected
    assert len(set(expected)) == 3 and all(expected)


def test_nllb_translates_sentence_by_sentence(nllb):
    engine = NLLB("th", str(nllb[1]), device="cpu")
    one, two = engine.translate(["The cat sat.", "Was it so?"])
    assert engine.translate(["The cat sat.  Was it so?"]) == [f"{one}  {two}"]


def test_nllb_rows(nllb, tmp_path):
    engine = NLLB("th", str(nllb[1]), device="cpu")
    with contextlib.closing(Cache(tmp_path / "cache.sqlite")) as cache:
        rows = [Row("1", (Turn("The cat sat.", "", "A dog ran."),))]
        estimate = translate.estimate(rows, engine, cache, "th")
        assert (estimate.texts, estimate.cached_characters, estimate.dollars) == (
            0,
            22,
            0.0,
        )  # the trial did it
        result = translate.translate(rows, engine, cache, "th")
        assert len(result.rows) + len(result.rejected) > 0


def test_the_name_tells_models_apart(nllb, tmp_path):
    name = NLLB("th", str(nllb[1]), device="cpu").name
    assert name.startswith("nllb:ct2-") and len(name) == len("nllb:ct2-") + 8
    other = tmp_path / "ct2"
    other.mkdir()
    for file in nllb[1].iterdir():
        (other / file.name).write_bytes(file.read_bytes() + (b"\0" if file.name == "model.bin" else b""))
    assert NLLB("th", str(other), device="cpu").name != name


def test_a_model_that_is_not_converted(nllb, tmp_path):
    command = f"ct2-transformers-converter --model {nllb[0]} --output_dir hf-ct2 --quantization int8"
    with pytest.raises(UserError, match="not converted") as error:
        NLLB("th", str(nllb[0]))
    assert f"{command} --copy_files tokenizer.json tokenizer_config.json`" in str(error.value)
    with pytest.raises(UserError, match=r"no folder.*--model nowhere --output_dir nowhere-ct2"):
        NLLB("th", "nowhere")


def test_a_broken_model(nllb, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((nllb[1] / "tokenizer.json").read_bytes())
    (tmp_path / "model.bin").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        NLLB("th", str(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        NLLB("th", str(tmp_path))
