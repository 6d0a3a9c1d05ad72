"""python -m benchmarks.coverage [--tables=N] [--rows=127,8]

How often a 95 % interval holds the mean that it is for, by simulation: word probabilities are drawn as
min(1, c · exp(s · z)), z normal, so many rows a table, and an interval of each kind is made of each. s, the
standard deviation of the logarithm, is 1.2 to 18.6 where SmolLM2-135M is probed. Prints tables in Markdown,
where c is such that a fortieth of the rows are at 1, and where it is 1e-6. In brackets are median widths.
"""

import argparse

import numpy as np
from scipy import stats

from prom_jax.analysis.statistics import LEVEL, interval, mean_interval, resampled_means, share_interval
from prom_jax.utils import cli
from prom_jax.utils.console import console

SPREADS = (1, 2, 3, 4, 5, 6)
TAIL = (1 - LEVEL) / 2
SEED = 0  # of resamples and weights, which all tables of a size share
# What c is, by name: a fortieth of the rows reach 1, or the median is 1e-6.
SCALES = {"known": lambda spread: np.exp(-1.96 * spread), "faint": lambda spread: 1e-6}


def percentile(values):
    """Of the bootstrap."""
    return interval(resampled_means(values, SEED))


def bca(values):
    """Bias-corrected and accelerated bootstrap (Efron 1987)."""
    means, mean = resampled_means(values, SEED), values.mean(axis=0)
    bias = stats.norm.ppf(np.clip((means < mean).mean(axis=0), 1e-4, 1 - 1e-4))
    influence = (values - mean) / (len(values) - 1)
    acceleration = (influence**3).sum(axis=0) / (6 * (influence**2).sum(axis=0) ** 1.5)
    z = bias + stats.norm.ppf([[TAIL], [1 - TAIL]])
    at = stats.norm.cdf(bias + z / (1 - acceleration * z)) * (len(means) - 1)
    return np.take_along_axis(np.sort(means, axis=0), at.round().astype(int), axis=0)


def bootstrap_t(values):
    """Of the studentized mean (Efron 1982)."""
    number, mean, deviation = len(values), values.mean(axis=0), values.std(axis=0, ddof=1)
    means, squares = resampled_means(values, SEED), resampled_means(values**2, SEED)
    deviations = np.sqrt(np.maximum(squares - means**2, 0) * number / (number - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((means - mean) / deviations, posinf=0, neginf=0)
    low, high = np.quantile(t, [TAIL, 1 - TAIL], axis=0)
    return mean - high * deviation, mean - low * deviation


def bounded(values):
    """The probe's: `statistics.mean_interval`, of probabilities."""
    return mean_interval(values, 0, 1, SEED)


def bounded_difference(values):
    """The probe's of a difference of two probabilities."""
    return mean_interval(values, -1, 1, SEED)


def mean_of_logs(logs):
    """Student's t on the logarithms, for the mean of these: that is another quantity."""
    return stats.t.interval(LEVEL, len(logs) - 1, logs.mean(axis=0), stats.sem(logs))


def share_that_leads(leads):
    """The exact interval of the share of rows in which one is larger: of ranks, another quantity too."""
    ends = {number: share_interval(number, len(leads)) for number in set(leads.sum(axis=0).tolist())}
    return np.array([ends[number] for number in leads.sum(axis=0).tolist()]).T


OF_MEANS = {"percentile": percentile, "BCa": bca, "bootstrap-t": bootstrap_t, "bounded": bounded}
OF_DIFFERENCES = OF_MEANS | {"bounded": bounded_difference}


def true_mean(scale: float, spread: float) -> float:
    """E min(1, c · exp(s · z))."""
    reached = -np.log(scale) / spread  # the z from which on it is 1
    return scale * np.exp(spread**2 / 2) * stats.norm.cdf(reached - spread) + stats.norm.sf(reached)


def simulate(rows: int, tables: int, scale: float, spread: float) -> dict[str, tuple[float, float]]:
    """Share of tables whose interval holds the true value, and the median width, by name of the interval."""
    logs = np.log(scale) + spread * np.random.default_rng([rows, spread]).standard_normal((2, rows, tables))
    english, target = np.exp(np.minimum(0, logs))
    mean = true_mean(scale, spread)
    found = {name: (method(english), mean) for name, method in OF_MEANS.items()}
    for name, method in OF_DIFFERENCES.items():
        found[f"difference, {name}"] = method(english - target), 0
    found["mean of logs"] = mean_of_logs(logs[0]), np.log(scale)
    found["share that leads"] = share_that_leads(logs[0] > logs[1]), 0.5
    return {
        name: (np.mean((low <= true) & (true <= high)), np.median(high - low))
        for name, ((low, high), true) in found.items()
    }


def main(argv=None):
    """Reads the command line and simulates."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tables", type=cli.at_least(1), default=200, help="simulated for each number")
    parser.add_argument("--rows", default="127,8", help="of a table, one or more")
    arguments = parser.parse_args(argv)
    for kind, scale in SCALES.items():
        for rows in map(int, arguments.rows.split(",")):
            found = [simulate(rows, arguments.tables, scale(spread), spread) for spread in SPREADS]
            print_table(f"{kind}, {rows} rows", found)


def print_table(title: str, found: list[dict]):
    """Prints a line for each interval: coverage, and width in brackets, by spread."""
    console.print(f"| {title} | {' | '.join(f's = {spread}' for spread in SPREADS)} |")
    console.print(f"|---|{'---|' * len(SPREADS)}")
    for name in found[0]:
        cells = (f"{of[name][0]:.2f} ({of[name][1]:.1g})" for of in found)
        console.print(f"| {name} | {' | '.join(cells)} |")
    console.print()


if __name__ == "__main__":
    cli.guard(main)
