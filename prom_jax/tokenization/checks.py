"""What every tokenizer must be, whichever files it comes from."""

from collections.abc import Callable

from prom_jax.tokenization.base import PreTrainedTokenizerFast
from prom_jax.utils.errors import UserError

LONGEST = 1000  # characters of a token; the ways to halve it cost its square


def load_checked(build: Callable, path, source) -> PreTrainedTokenizerFast:
    """The tokenizer that `build(path)` gives.

    Args:
      build: reads the tokenizer's files.
      path: where they are.
      source: what its user calls them.

    Returns:
      The tokenizer.

    Raises:
      UserError: if there is none, it is of a kind that is not supported, or it has no EOS token.
    """
    try:
        tokenizer = build(path)
        if not tokenizer.is_fast or not tokenizer("a")["input_ids"]:
            raise ValueError("it makes nothing of a text")
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of as many kinds as there are libraries; Rust's panics are no Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the tokenizer in {path} cannot be read ({reason:.200}): expected a valid tokenizer.json, "
            "SentencePiece tokenizer.model or GGUF file; fetch it again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {source} has no EOS token, which ends every response: "
            "set `eos_token` in its tokenizer_config.json"
        )
    return tokenizer


def check_lengths(tokens):
    if (longest := max(map(len, tokens), default=0)) > LONGEST:
        raise ValueError(f"it has a token of {longest} characters, at most {LONGEST} are expected")
