"""Places on this machine and in an object store, and what goes wrong there."""

import contextlib
import os
import re

from etils import epath

from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import require

# What Orbax, TensorStore and the system raise where files cannot be read or written. What an object store's
# clients raise has no kind in common, so that they are caught as `Exception`.
STORE_ERRORS = (OSError, ValueError, KeyError, TypeError)
REMOTE = "gs://"


def resolve_path(path) -> epath.Path:
    """A place on this machine, made absolute, or in an object store.

    Raises:
      UserError: for an object store that is not supported, or for which a package is missing.
    """
    scheme = re.match(r"\w+://", str(path))
    if not scheme:
        return epath.Path(os.path.abspath(path))
    if scheme[0] != REMOTE:
        raise UserError(f"{path} is in no place that is supported: expected a path or gs://bucket/…")
    require("gcs")
    return epath.Path(path)


def is_remote(place) -> bool:
    """Whether a place is in an object store."""
    return str(place).startswith(REMOTE)


def errors(directory):
    """The exceptions that say that a directory, which may be in an object store, cannot be used."""
    return (Exception,) if is_remote(directory) else STORE_ERRORS


@contextlib.contextmanager
def reraise_storage_errors(directory):
    """Raises UserError where the block finds that a directory cannot be made, read or written."""
    try:
        yield
    except UserError:
        raise
    except errors(directory) as error:
        remedy = "free some space or choose another place"
        if is_remote(directory):
            remedy = (
                "see that the bucket is there and open to you, log in with "
                "`gcloud auth application-default login`, or choose another place"
            )
        raise UserError(f"{directory} cannot be used ({reason(error)}): {remedy}") from error


def reason(error: Exception) -> str:
    """The gist of an error: TensorStore's name every layer, and the errno is embedded in the message."""
    if code := re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", str(error)):
        return os.strerror(int(code[1] or code[2]))
    missing = "not found: " * isinstance(error, FileNotFoundError)  # gcsfs gives the address alone
    return missing + next(iter(str(error).splitlines()), type(error).__name__)[:200]
