"""Aligned sentences that are known by name: fetched once from where their authors publish them.

- ``ntrex``: NTREX-128 (Federmann et al. 2022), 1,997 sentences of news;
- ``flores200``: the dev part of FLORES-200 (NLLB Team 2022), 997 sentences; ``flores200@devtest`` is the
  part to evaluate on, 1,012 sentences.

Both are CC BY-SA 4.0. They go to ``~/.cache/prom_jax/corpora``. With PROM_JAX_MIRROR set, an address is asked
for there, without its scheme: ``$PROM_JAX_MIRROR/raw.githubusercontent.com/…``.
"""

import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from prom_jax.data.languages import find_code
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError

MIRROR = "PROM_JAX_MIRROR"
NTREX = (
    "https://raw.githubusercontent.com/MicrosoftTranslator/NTREX/"
    "8561f6a622db9edad1217683e5c83daefd8bb2bf/NTREX-128/"
)
NTREX_SUMS = Path(__file__).parents[1] / "resources" / "ntrex.sha256"  # of all files at that commit
FLORES = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"
NAMES = ("ntrex", "flores200", "flores200@devtest")
EVALUATION = NAMES[2:]
TIMEOUT = 60  # seconds without an answer


def find(name: str, language: str) -> tuple[Path, Path]:
    """The English and the target file of a corpus, with a sentence a line.

    Args:
      name: of NAMES.
      language: code of the target language.

    Raises:
      UserError: a corpus without the language; one that cannot be fetched, or is not what it was.
    """
    try:
        return _ntrex(language) if name == "ntrex" else _flores(language, name.partition("@")[2] or "dev")
    except OSError as error:
        raise UserError(
            f"'{name}' cannot be fetched or kept in {_cache()} ({error}): name local files in its place, or "
            f"a mirror with {MIRROR}."
        ) from error


def _cache() -> Path:
    return Path("~/.cache/prom_jax/corpora").expanduser()


def _ntrex(language: str) -> tuple[Path, Path]:
    sums = _read_sums(NTREX_SUMS)
    codes = {name.split(".")[1]: name for name in sums}
    english = codes.pop("eng")
    target = codes[find_code(language, list(codes))]

    def fetched(name: str) -> Path:
        return _fetched(NTREX + name, _cache() / "ntrex" / name, sums[name])

    return fetched(english), fetched(target)


def _flores(language: str, part: str) -> tuple[Path, Path]:
    """As `find`. Nobody publishes a sum of this archive: that of the first fetch is kept, for later ones."""
    folder = _cache() / "flores200"
    if not folder.is_dir():
        _cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_cache()) as temporary:
            archive = _fetched(FLORES, Path(temporary) / "archive")
            _record(archive, _cache() / "flores200.sha256")
            _unpack(archive, unpacked := Path(temporary) / "flores200")
            if not folder.is_dir():  # else another process was faster
                unpacked.rename(folder)
    codes = {path.stem: path for path in (folder / part).glob(f"*.{part}")}
    target = find_code(language, sorted(codes.keys() - {"eng_Latn"}))
    return codes["eng_Latn"], codes[target]


def _fetched(url: str, path: Path, sha256: str | None = None) -> Path:
    """A file, fetched where it is not there, that has this sum if one is given."""
    if not path.is_file():
        mirror = os.environ.get(MIRROR, "").rstrip("/")
        where = f"{mirror}/{url.partition('://')[2]}" if mirror else url
        console.print(f"fetch     {where} (CC BY-SA 4.0)")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with urllib.request.urlopen(where, timeout=TIMEOUT) as answer, open(partial, "wb") as file:
                shutil.copyfileobj(answer, file)
            partial.rename(path)
        except (OSError, ValueError) as error:  # the latter of what is no address
            raise OSError(f"{where}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
    if sha256 and _sum(path) != sha256:
        raise UserError(
            f"{path} is not what its authors published (its sha256 is {_sum(path)}, and not {sha256}): "
            "remove it, and it is fetched again."
        )
    return path


def _record(archive: Path, sums: Path) -> None:
    """Keeps an archive's sum, or compares it with the one that was kept.

    Raises:
      UserError: it is another one.
    """
    found = _sum(archive)
    kept = _read_sums(sums)["archive"] if sums.is_file() else found
    if kept != found:
        raise UserError(
            f"{FLORES} is not what was fetched first (its sha256 is {found}, and not {kept}): if its authors "
            f"changed it, remove {sums}, and the new one is taken."
        )
    sums.write_text(f"{found}  archive\n", encoding="utf-8")


def _unpack(archive: Path, folder: Path) -> None:
    """The sentences of an archive of FLORES-200, as dev/*.dev and devtest/*.devtest in a new folder."""
    with tarfile.open(archive) as members:
        for member in members:
            part, _, name = member.name.rpartition("/")
            part = part.rpartition("/")[2]
            wanted = member.isfile() and part in ("dev", "devtest") and name.endswith(f".{part}")
            if wanted and (file := members.extractfile(member)):
                (folder / part).mkdir(parents=True, exist_ok=True)
                (folder / part / name).write_bytes(file.read())
    if not (folder / "dev" / "eng_Latn.dev").is_file():
        raise UserError(f"{FLORES} has no dev/eng_Latn.dev: name local files in place of 'flores200'.")


def _read_sums(path: Path) -> dict[str, str]:
    """{file: sum} of what `sha256sum` writes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: found for found, name in (line.split("  ", 1) for line in lines)}


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
