"""Corpora that are fetched by name, from a server of this machine."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import pytest

from prom_jax.data import corpora, sources
from prom_jax.data.examples import Recipe
from prom_jax.data.rows import Sentence
from prom_jax.utils.config_file import load as config_file
from prom_jax.utils.errors import UserError

CODES = {"ar": "arb_Arab", "bn": "ben_Beng", "el": "ell_Grek", "ml": "mal_Mlym", "mr": "mar_Deva"}
CODES |= {"sw": "swh_Latn", "ta": "tam_Taml", "te": "tel_Telu", "th": "tha_Thai"}
NTREX = {
    "ar": "arb",
    "bn": "ben",
    "el": "ell",
    "ml": "mal",
    "mr": "mar",
    "sw": "swa",
    "ta": "tam",
    "te": "tel",
}
NTREX |= {
    "th": "tha",
    "es": "spa",
    "zh": "zho-CN",
    "zh-TW": "zho-TW",
    "pt": "por",
    "fa": "fas",
    "sr": "srp-Cyrl",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror with both corpora: sentences that say where they are from."""
    folder = tmp_path / "server"
    ntrex = folder / corpora.NTREX.partition("://")[2]
    ntrex.mkdir(parents=True)
    sums = []
    for name in ("src.eng", *(f"ref.{code}" for code in NTREX.values())):
        (ntrex / f"newstest2019-{name}.txt").write_text("".join(f"ntrex {name} {i}\n" for i in range(3)))
        digest = hashlib.sha256((ntrex / f"newstest2019-{name}.txt").read_bytes()).hexdigest()
        sums.append(f"{digest}  newstest2019-{name}.txt\n")
    (tmp_path / "sums").write_text("".join(sums))
    write_flores(folder)
    make = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as found:
        found.asked, found.folder = [], folder
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        monkeypatch.setattr(corpora, "NTREX_SUMS", tmp_path / "sums")
        monkeypatch.setenv(corpora.MIRROR, f"http://127.0.0.1:{found.server_port}/")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield found
        found.shutdown()
        thread.join()


def write_flores(folder: Path, sentences: int = 2):
    path = folder / corpora.FLORES.partition("://")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for part in ("dev", "devtest"):
            for code in ("eng_Latn", *CODES.values()):
                text = "".join(f"{part} {code} {i}\n" for i in range(sentences)).encode()
                member = tarfile.TarInfo(f"./flores200_dataset/{part}/{code}.{part}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))


@pytest.mark.parametrize("language", CODES)
def test_the_nine_configurations_name_what_is_fetched(server, language):
    names = tuple(config_file(f"configs/{language}.py").data.translation)
    found = sources.read_parallel(names, language)
    code, flores = NTREX[language], CODES[language]
    assert found == [Sentence(None, f"ntrex src.eng {i}", f"ntrex ref.{code} {i}") for i in range(3)] + [
        Sentence(None, f"dev eng_Latn {i}", f"dev {flores} {i}") for i in range(2)
    ]


def test_each_file_is_fetched_once(server):
    names = ("ntrex", "flores200")
    before = sources.fingerprint("ntrex", "th"), sources.fingerprint("flores200", "th")
    sources.read_parallel(names, "th")
    assert len(server.asked) == 3
    sources.read_parallel(names, "sw")
    assert len(server.asked) == 4  # one more file of NTREX
    assert before == (sources.fingerprint("ntrex", "th"), sources.fingerprint("flores200", "th"))
    assert sources.fingerprint("flores200@devtest", "th") not in before
    assert sources.read_parallel(("flores200@devtest",), "th")[0] == Sentence(
        None, "devtest eng_Latn 0", "devtest tha_Thai 0"
    )


def test_a_file_that_is_not_what_was_published_is_refused(server):
    sources.read_parallel(("ntrex",), "th")
    path = Path("~/.cache/prom_jax/corpora/ntrex/newstest2019-ref.tha.txt").expanduser()
    path.write_text("others\n")
    with pytest.raises(UserError, match=r"newstest2019-ref.tha.txt is not what its authors published"):
        sources.read_parallel(("ntrex",), "th")
    path.unlink()
    assert len(sources.read_parallel(("ntrex",), "th")) == 3


def test_an_archive_is_compared_with_the_one_that_was_fetched_first(server):
    sources.read_parallel(("flores200",), "th")
    cache = Path("~/.cache/prom_jax/corpora").expanduser()
    (cache / "flores200").rename(cache / "gone")
    assert len(sources.read_parallel(("flores200",), "th")) == 2
    (cache / "flores200").rename(cache / "gone too")
    write_flores(server.folder, sentences=4)
    with pytest.raises(UserError, match=r"flores200_dataset.tar.gz is not what was fetched first"):
        sources.read_parallel(("flores200",), "th")
    (cache / "flores200.sha256").unlink()
    assert len(sources.read_parallel(("flores200",), "th")) == 4


def test_what_cannot_be_fetched_is_named(server, monkeypatch):
    with pytest.raises(UserError, match=r"There is no language 'eo' in script Latn among the \d+"):
        sources.read_parallel(("ntrex",), "eo")
    (server.folder / corpora.FLORES.partition("://")[2]).unlink()
    with pytest.raises(
        UserError, match=r"'flores200' cannot be fetched.*tar\.gz: HTTP Error 404.*PROM_JAX_MIRROR"
    ):
        sources.read_parallel(("flores200",), "th")
    assert not list(Path("~/.cache/prom_jax/corpora").expanduser().rglob("*.partial"))


def test_take_and_repeat_are_of_pairs(server):
    (taken,) = sources.read_parallel(("ntrex?take=1&repeat=2",), "th")
    assert taken == Sentence(None, "ntrex src.eng 0", "ntrex ref.tha 0", repeat=2)


def test_devtest_is_not_trained_on():
    with pytest.raises(UserError, match=r"devtest, which is for eval\.text alone"):
        Recipe("th", translation=("flores200@devtest?take=5",))


@pytest.mark.parametrize("language", NTREX)
def test_the_sums_name_the_file_of_a_language(server, language):
    assert corpora.find("ntrex", language)[1].name == f"newstest2019-ref.{NTREX[language]}.txt"


def test_the_sums_that_the_package_has():
    lines = corpora.NTREX_SUMS.read_text().splitlines()
    assert len(lines) == 128 and {f"newstest2019-ref.{code}.txt" for code in NTREX.values()} <= {
        line[66:] for line in lines
    }
    assert (
        "389e8f5796c66db4f646dfad33e1ec622d74767af5ef112b42a1f2cd814df3cc  newstest2019-src.eng.txt" in lines
    )
