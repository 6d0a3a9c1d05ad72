"""How often each example comes in an epoch: as a source repeats it, and as streams and languages are to
have a share.

Which examples an epoch takes is a function of these numbers, the seed and the epoch alone, so that batches
stay random access.
"""

import math
from collections.abc import Sequence

import numpy as np

from prom_jax.utils.errors import UserError

ROUNDS = 100  # of fitting; shares that can be had are met long before
TOLERANCE = 1e-3


def parse_shares(entries: Sequence[str], languages: Sequence[str] = ()) -> dict[str, float]:
    """{stream or language: share} from entries 'name=share'. Where every language is named, the numbers of
    these are weights of any size.

    Raises:
      UserError: an entry that is not so.
    """
    shares: dict[str, float] = {}
    for entry in entries:
        name, _, share = entry.partition("=")
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if not (name and 0 < number < math.inf) or name in shares:
            raise _no_share(entry)
        shares[name] = number
    if len(languages) > 1 and set(languages) <= shares.keys():
        total = sum(shares[language] for language in languages)
        shares |= {language: shares[language] / total for language in languages}
    for name, number in shares.items():
        if number >= 1:
            raise _no_share(f"{name}={number:g}")
    return shares


def _no_share(entry: str) -> UserError:
    return UserError(
        f"data.share has '{entry}': expected 'name=share' once for a stream or a language, such as "
        "'english=0.25', more than 0 and less than 1; of several languages, if all are named, weights such "
        "as 'sw=1','th=3'."
    )


def fit(
    present: dict[str, np.ndarray],
    repeats: np.ndarray,
    shares: dict[str, float],
    languages: Sequence[str] = (),
) -> np.ndarray:
    """How often each example comes in an epoch, so that a share of all is of a stream, or of a language.

    Args:
      present: by stream and language, bool [examples], which are of it.
      repeats: int [examples], how often each comes without shares.
      shares: by stream and language.
      languages: the languages; where one has a share, an epoch is so long that none has fewer examples than
        without.

    Returns:
      float64 [examples]; without shares the repeats. Examples of nothing that has a share come as often as
      they would without.

    Raises:
      UserError: shares that these examples cannot have.
    """
    times = repeats.astype(np.float64)
    for name in shares:
        if not present.get(name, np.zeros(1, bool)).any():
            raise UserError(f"data.share names '{name}', and the data have none of it: leave it out.")
    for _ in range(ROUNDS * bool(shares)):
        for name, share in shares.items():
            has, others = times[present[name]].sum(), times[~present[name]].sum()
            if others:
                times[present[name]] *= share * others / ((1 - share) * has)
    found = {name: times[present[name]].sum() / times.sum() for name in shares}
    if missed := {n: found[n] for n in shares if not abs(found[n] - shares[n]) < TOLERANCE}:
        name, share = next(iter(missed.items()))
        raise UserError(
            f"data.share: {name}={shares[name]:g} cannot be had, as the examples that have it "
            f"come to {share:.2f}: every one has it, or too few are left for the others; change the shares."
        )
    if not shares.keys().isdisjoint(languages):
        of_languages = (present[language] for language in languages)
        times *= max(repeats[ours].sum() / times[ours].sum() for ours in of_languages)
    return times


def draw(times: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Indices of the examples of an epoch, in order, each as often as its number says: over the epochs
    exactly so, and in one as near as whole numbers are.

    Args:
      times: as `fit` gives them.
    """
    begun = np.random.default_rng([seed, len(times), 2]).random(len(times))
    number = np.floor((epoch + 1) * times + begun) - np.floor(epoch * times + begun)
    return np.repeat(np.arange(len(times)), number.astype(np.int64))
