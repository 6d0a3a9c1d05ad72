"""How often each example comes in an epoch: as a source repeats it, and as streams are to have a share.

Which examples an epoch takes is a function of these numbers, the seed and the epoch alone, so that batches
stay random access.
"""

import numpy as np

from prom_jax.utils.errors import UserError

ROUNDS = 100  # of fitting; shares that can be had are met long before
TOLERANCE = 1e-3


def parse_shares(entries: tuple[str, ...]) -> dict[str, float]:
    """{stream: share} from entries 'stream=share'.

    Raises:
      UserError: an entry that is not so.
    """
    shares: dict[str, float] = {}
    for entry in entries:
        stream, _, share = entry.partition("=")
        try:
            shares[stream] = float(share)
        except ValueError:
            shares[stream] = 0.0
        if not (stream and 0 < shares[stream] < 1):
            raise UserError(
                f"data.stream_share has '{entry}': expected 'stream=share', such as 'english=0.25', more "
                "than 0 and less than 1."
            )
    return shares


def fit(present: dict[str, np.ndarray], repeats: np.ndarray, shares: dict[str, float]) -> np.ndarray:
    """How often each example comes in an epoch, so that a share of all have text in a stream.

    Args:
      present: by stream, bool [examples], which have it.
      repeats: int [examples], how often each comes without shares.
      shares: by stream.
    Returns:
      float64 [examples]; where no stream is to have a share, the repeats. Examples with none of the streams
      come as often as they would without.
    Raises:
      UserError: shares that these examples cannot have.
    """
    times = repeats.astype(np.float64)
    for stream in shares:
        if not present.get(stream, np.zeros(1, bool)).any():
            raise UserError(
                f"data.stream_share names '{stream}', and the data have none of it: leave it out."
            )
    for _ in range(ROUNDS * bool(shares)):
        for stream, share in shares.items():
            has, others = times[present[stream]].sum(), times[~present[stream]].sum()
            if others:
                times[present[stream]] *= share * others / ((1 - share) * has)
    found = {stream: times[present[stream]].sum() / times.sum() for stream in shares}
    if missed := {s: found[s] for s in shares if not abs(found[s] - shares[s]) < TOLERANCE}:
        stream, share = next(iter(missed.items()))
        raise UserError(
            f"data.stream_share: {stream}={shares[stream]} cannot be had, as the examples that have it "
            f"come to {share:.2f}: every one has it, or too few are left for the others; change the shares."
        )
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
