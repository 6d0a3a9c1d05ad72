"""python -m benchmarks.power [--seeds=3] [--paragraphs=60] [--questions=5] [--tests=9] [--studies=300]

What can a study of several seeds see? Simulates studies of paired differences between two methods, and prints
as a table in Markdown how often the 95 % interval of the hierarchical bootstrap holds the true difference,
how wide it is, and which difference is found in eight of ten studies after a correction for so many tests.

A difference has a part of the seed, one of the paragraph, one of both together, and one of the question,
all normal. The standard deviation of the paragraph's is 1; the columns vary that of the seed's, given as what
it adds to the standard error of the mean, over what paragraphs and questions add.
"""

import argparse

import numpy as np

from prom_jax.analysis import comparison
from prom_jax.analysis.comparison import clustered_bootstrap
from prom_jax.utils import cli
from prom_jax.utils.console import console, track

OF_BOTH, OF_QUESTION = 0.5, 3.0  # standard deviations, in those of paragraphs
RATIOS = (0.0, 0.5, 1.0, 2.0)
POWER, LEVEL = 0.8, 0.05


def main(argv=None):
    """Reads the command line and simulates."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.power",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    for name, default in (("seeds", 3), ("paragraphs", 60), ("questions", 5), ("tests", 9), ("studies", 300)):
        parser.add_argument(f"--{name}", type=cli.at_least(1), default=default)
    arguments = parser.parse_args(argv)
    comparison.RESAMPLES = 1000  # enough for a share of studies
    console.print(
        "| seeds add, over what items add | interval holds | width | found in 8 of 10 |\n|---|---|---|---|"
    )
    for ratio in RATIOS:
        console.print(f"| {ratio:g} | {' | '.join(row(arguments, ratio))} |")


def row(sizes, ratio: float) -> list[str]:
    """Coverage, median width, and the detectable difference, of one ratio."""
    random, error = np.random.default_rng(0), standard_error(sizes)
    of_seed = ratio * error * np.sqrt(sizes.seeds)
    clusters = np.repeat(np.arange(sizes.paragraphs), sizes.questions)
    tests = [
        clustered_bootstrap(study(sizes, of_seed, random), clusters, seed)
        for seed in track(range(sizes.studies), f"ratio {ratio:g}", sizes.studies)
    ]
    holds = np.mean([test.low <= 0 <= test.high for test in tests])
    width = np.median([test.high - test.low for test in tests])
    return [f"{holds:.3f}", f"{width:.3f}", f"{detectable(tests, sizes.tests):.3f}"]


def standard_error(sizes) -> float:
    """That of a mean difference, of paragraphs, questions and what both and seeds make together."""
    of_paragraph = 1 + (OF_BOTH**2 + OF_QUESTION**2 / sizes.questions) / sizes.seeds
    return float(np.sqrt(of_paragraph / sizes.paragraphs))


def study(sizes, of_seed: float, random: np.random.Generator) -> np.ndarray:
    """Differences of one study in which there is none on the whole, [seeds, items]."""
    shape = (sizes.seeds, sizes.paragraphs, sizes.questions)
    parts = (
        random.normal(0, of_seed, (sizes.seeds, 1, 1)),
        random.normal(0, 1, (1, sizes.paragraphs, 1)),
        random.normal(0, OF_BOTH, (sizes.seeds, sizes.paragraphs, 1)),
        random.normal(0, OF_QUESTION, shape),
    )
    return np.broadcast_to(sum(parts), shape).reshape(sizes.seeds, -1)


def detectable(tests, number: int) -> float:
    """The smallest difference that POWER of the studies would find at LEVEL over `number` tests.

    A shift of all items moves the mean and leaves the deviations of resamples: a study finds it where the
    shifted mean is farther from 0 than the (1 − LEVEL / number) quantile of these, taken as normal.
    """
    from scipy.stats import norm

    errors = np.array([(test.high - test.low) / (2 * norm.ppf(0.975)) for test in tests])
    needed = norm.ppf(1 - LEVEL / number / 2) * errors - np.array([test.difference for test in tests])
    return float(np.quantile(needed, POWER))


if __name__ == "__main__":
    cli.guard(main)
