"""Machine translation engines: Google Cloud Translation, which the paper used, and NLLB-200 on this machine.

Both turn a list of one-line texts into the list of their translations, and know neither instructions nor the
cache (`prom_jax.data.translation.translate` does). Their packages come with the extra `translate`.
"""

import hashlib
import re
import shlex
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prom_jax.data.languages import find_code
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs


class Engine(Protocol):
    """What translates.

    Attributes:
      name: key of the cache; another name means other translations.
      price: US dollars for a million characters, 0 for a local engine.
      rate: characters a second that it accepts, 0 where only a trial can tell.
      workers: requests in flight.
      max_texts, max_characters: what one request may hold; one text alone may have more characters.
    """

    name: str
    price: float
    rate: float
    workers: int
    max_texts: int
    max_characters: int

    def translate(self, texts: list[str]) -> list[str]:
        """The translation of each text.

        Raises:
          UserError: what trying again cannot fix.
        """
        ...


@dataclass
class Unconnected:
    """An engine of which the cost is known and nothing else: without client, account or network.

    Its attributes are those of `Engine`, with an infinite rate where only a trial could tell.
    """

    name: str
    price: float
    rate: float
    workers: int = 1
    max_texts: int = 1
    max_characters: int = 1

    def translate(self, texts: list[str]) -> list[str]:
        """See `Engine`."""
        raise UserError(f"'{self.name}' was asked for its cost alone: leave --dry_run out.")


# Google ---------------------------------------------------------------------------------------

# Defaults of a project by https://cloud.google.com/translate/quotas: 6,000,000 characters a minute for the
# general model, white space included. At most 5,000 characters a request are recommended, for speed (30,000
# is the limit); full requests of that size are then at most 1,200 a minute.
CHARACTERS_PER_MINUTE = 6_000_000
# Regional hosts serve the regions on their own soil alone:
# https://cloud.google.com/translate/docs/advanced/endpoints
LOCATIONS = {"translate-eu.googleapis.com": "europe-west1", "translate-us.googleapis.com": "us-west1"}
TIMEOUT = 60.0  # seconds for one attempt
FIRST_WAIT, LONGEST_WAIT, PATIENCE = 1.0, 60.0, 600.0  # seconds: of backoff, and of trying altogether


class Google:
    """Cloud Translation v3 over REST, its general neural model.

    Args:
      language, source: BCP 47 codes.
      project: of Google Cloud; None takes the one that the credentials name.
      endpoint: a regional host such as ``translate-eu.googleapis.com``, or the address of a proxy
        (``http://127.0.0.1:8080``), which is sent no credentials unless over https.
      characters_per_minute: the project's quota.
      credentials: `google.auth` credentials; None takes the application default ones.

    Raises:
      UserError: no package, no credentials or no project.
    """

    price = 20.0  # https://cloud.google.com/translate/pricing; the first 500,000 characters a month are free
    workers = 4
    max_texts = 1024  # a request's own limit
    max_characters = 5000

    def __init__(
        self,
        language: str,
        source: str = "en",
        project: str | None = None,
        endpoint: str | None = None,
        characters_per_minute: int = CHARACTERS_PER_MINUTE,
        credentials=None,
    ):
        with needs("translate"):
            import google.cloud.translate_v3 as translate
            from google.auth.credentials import AnonymousCredentials
            from google.cloud.translate_v3.services.translation_service import transports

        self.name = "google"
        self.rate = characters_per_minute / 60
        scheme, _, host = (endpoint or "translate.googleapis.com").rstrip("/").rpartition("://")
        scheme = scheme or "https"
        if credentials is None and scheme == "http":
            credentials = AnonymousCredentials()  # a token in clear text is anybody's
        if credentials is None or project is None:
            credentials, project = _default_credentials(credentials, project)
        self._project = project
        self._credentials = credentials
        self._request = {
            "parent": f"projects/{project}/locations/{LOCATIONS.get(host, 'global')}",
            "mime_type": "text/plain",
            "source_language_code": source,
            "target_language_code": language,
        }
        transport = transports.TranslationServiceRestTransport(
            host=host, url_scheme=scheme, credentials=credentials
        )
        self._client = translate.TranslationServiceClient(transport=transport)
        self._lock = threading.Lock()
        self._free = 0.0  # the moment at which the quota allows the next request

    def translate(self, texts: list[str]) -> list[str]:
        """Asks for one request's translations; waits for the quota and out of passing failures.

        Raises:
          UserError: wrong project, permission denied, no valid credentials, a language the service does not
            know, or no success within `PATIENCE` seconds.
        """
        from google.api_core.exceptions import GoogleAPIError
        from google.api_core.retry import Retry
        from google.api_core.timeout import ConstantTimeout
        from google.auth.exceptions import GoogleAuthError
        from requests.exceptions import RequestException

        retry = Retry(
            _passing, FIRST_WAIT, LONGEST_WAIT, timeout=PATIENCE, on_error=_wait_as_told
        )  # exponential, with jitter
        self._wait_for_quota(sum(map(len, texts)))
        try:
            response = self._client.translate_text(
                request={**self._request, "contents": texts}, retry=retry, timeout=ConstantTimeout(TIMEOUT)
            )
        except (GoogleAPIError, GoogleAuthError, RequestException) as error:
            raise UserError(self._explain(error)) from None
        answers = [translation.translated_text for translation in response.translations]
        if len(answers) != len(texts):
            raise UserError(
                f"The service answered {len(texts)} texts with {len(answers)}: check the endpoint."
            )
        return answers

    def _wait_for_quota(self, characters: int) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free)
            self._free = start + characters / self.rate
        time.sleep(start - now)

    def _explain(self, error: Exception) -> str:
        """One line, without what the service may have echoed of the credentials."""
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError

        if isinstance(error, GoogleAuthError | exceptions.Unauthorized):
            return (
                "Google Cloud does not accept the credentials: log in anew with "
                "`gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS."
            )
        last = error.cause if isinstance(error, exceptions.RetryError) else error
        reason = " ".join(str(getattr(last, "message", last)).split())[:300]
        if token := getattr(self._credentials, "token", None):
            reason = reason.replace(token, "…")
        where = f"Google Cloud Translation, project '{self._project}'"
        if isinstance(error, exceptions.RetryError):
            return (
                f"{where}: no success in {PATIENCE:.0f} seconds of trying ({type(last).__name__}: {reason}); "
                "run the same command again later, what is translated is kept."
            )
        return f"{where}: {reason.rstrip('.')} ({type(last).__name__}); {_remedy(last)}"


def _default_credentials(credentials, project):
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        found, default = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    except DefaultCredentialsError:
        raise UserError(
            "There are no Google Cloud credentials here: run `gcloud auth application-default login`, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account."
        ) from None
    if not (project or default):
        raise UserError("The Google Cloud credentials name no project: give one with --project.")
    return credentials or found, project or default


def _passing(error: Exception) -> bool:
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError
    from requests.exceptions import ChunkedEncodingError, ConnectionError, Timeout

    # The service answers an exceeded quota of a minute with 403 "User Rate Limit Exceeded" too.
    return (
        isinstance(error, ConnectionError | Timeout | ChunkedEncodingError | TransportError)
        or getattr(error, "code", None) in (429, 500, 502, 503, 504)
        or (isinstance(error, exceptions.Forbidden) and "rate limit" in error.message.lower())
    )


def _wait_as_told(error: Exception) -> None:
    """Sleeps for the answer's Retry-After, which the client's backoff does not look at."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = headers.get("Retry-After", "")
    if seconds.isdecimal():
        time.sleep(min(float(seconds), LONGEST_WAIT))


def _remedy(error: Exception) -> str:
    if "limit exceeded" in str(error).lower():
        return "ask for a higher quota, or run the same command again tomorrow: what is translated is kept."
    return {
        400: "check the language code, and --project.",
        403: "enable the Cloud Translation API and billing in this project, and give the account the role "
        "'Cloud Translation API User'.",
        404: "check --project.",
    }.get(getattr(error, "code", 0), "run the same command again, what is translated is kept.")


# NLLB -----------------------------------------------------------------------------------------

BEAMS = 4  # as in the NLLB paper's evaluation
MAX_TOKENS = 512  # of one sentence's translation
FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
HUB_MODEL = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
TOKENIZERS = "tokenizer.json", "sentencepiece.bpe.model"
COPIED = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json")


class NLLB:
    """NLLB-200 in CTranslate2's format, on CPU or GPU.

    Args:
      language, source: BCP 47 codes.
      model: folder with a converted model (``model.bin``) and its tokenizer (``tokenizer.json`` or
        ``sentencepiece.bpe.model``); or ``owner/name[@revision]`` of one on the hub, which is fetched.
      device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
      UserError: no package, no such folder, a model that is not converted or has no tokenizer, a language
        that it does not know, or a device that cannot hold it.
    """

    price = 0.0
    rate = 0.0
    workers = 1  # CTranslate2 fills the device with one batch
    max_texts = 32
    max_characters = 5000

    def __init__(self, language: str, model: str, source: str = "en", device: str = "auto"):
        with needs("translate"):
            import ctranslate2
            import sentencex

        self._segment = sentencex.segment
        folder = _fetched(model)
        _require_converted(folder)
        self._language = source
        self._encode, self._decode = _tokenizer(folder)
        try:
            self._translator = ctranslate2.Translator(str(folder), device=device)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(f"{folder} cannot be loaded on device '{device}' ({reason}).") from None
        codes = _codes(folder)
        self._source, self._target = find_code(source, codes), find_code(language, codes)
        with open(folder / "model.bin", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = f"nllb:{folder.resolve().name}-{digest[:8]}"

    def translate(self, texts: list[str]) -> list[str]:
        """Translates sentence by sentence, which is what the model knows; white space between them stays.

        Raises:
          UserError: the device ran out of memory.
        """
        sentences = [self._segment(self._language, text) for text in texts]
        translated = iter(self._translate([s.strip() for row in sentences for s in row if s.strip()]))
        return ["".join(_in_place(s, translated) for s in row) for row in sentences]

    def _translate(self, sentences: list[str]) -> list[str]:
        try:
            results = self._translator.translate_batch(
                [[self._source, *self._encode(sentence), "</s>"] for sentence in sentences],
                target_prefix=[[self._target]] * len(sentences),
                beam_size=BEAMS,
                max_decoding_length=MAX_TOKENS,
                max_batch_size=2048,
                batch_type="tokens",
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(f"NLLB failed ({reason}): try a smaller model or another --device.") from None
        return [self._decode(result.hypotheses[0][1:]) for result in results]  # [0] is the language


def _in_place(sentence: str, translated) -> str:
    """The next translation with the white space around `sentence`."""
    bare = sentence.strip()
    return sentence.replace(bare, next(translated).strip(), 1) if bare else sentence


def _codes(folder: Path) -> list[str]:
    vocabulary = next(folder.glob("shared_vocabulary.*")).read_text("utf-8")
    return list(dict.fromkeys(FLORES.findall(vocabulary)))


def _tokenizer(folder: Path):
    """Functions text -> tokens and tokens -> text of the model's tokenizer."""
    if (folder / TOKENIZERS[0]).is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / TOKENIZERS[0]))
        tokenizer.no_truncation()
        known = tokenizer.get_vocab()  # a model has a few more rows than its tokenizer has tokens
        return (
            lambda text: tokenizer.encode(text, add_special_tokens=False).tokens,
            lambda tokens: tokenizer.decode([known[token] for token in tokens if token in known]),
        )
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(folder / TOKENIZERS[1]))
    return lambda text: pieces.encode(text, out_type=str), pieces.decode


def _fetched(model: str) -> Path:
    """The folder of a model; one on the hub is fetched into the hub's cache, once.

    Raises:
      UserError: it cannot be fetched.
    """
    parts, folder = HUB_MODEL.fullmatch(model), Path(model).expanduser()
    if not parts or folder.exists() or folder.parent.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    console.print(
        f"nllb      {model} is fetched from the hub; the weights of NLLB-200 are for non-commercial use "
        "alone (CC-BY-NC 4.0)"
    )
    try:
        return Path(snapshot_download(parts["id"], revision=parts["revision"]))
    except Exception as error:  # of the hub's client, its network library and the file system
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"--nllb={model} cannot be fetched ({type(error).__name__}: {reason:.200}): give the "
            "owner/name of a CTranslate2 conversion on the hub, or a folder with one."
        ) from error


def _require_converted(folder: Path) -> None:
    converted = (folder / "model.bin").is_file()
    if converted and any((folder / name).is_file() for name in TOKENIZERS):
        return
    if converted:
        raise UserError(f"{folder} has no tokenizer: copy {TOKENIZERS[0]} of the original model into it.")
    present = [name for name in COPIED if (folder / name).is_file()] or [COPIED[0]]
    missing = "is a model that is not converted" if folder.is_dir() else "is no folder with a converted model"
    raise UserError(
        f"{folder} {missing}: run `ct2-transformers-converter --model {shlex.quote(str(folder))} "
        f"--output_dir {shlex.quote(folder.name + '-ct2')} --quantization int8 "
        f"--copy_files {' '.join(present)}` and give that folder."
    )
