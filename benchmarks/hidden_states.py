"""python -m benchmarks.hidden_states --model=MODEL --text=FILE [--lines=20] [--out=FILE]

What the pivot head of a run would read first, after each block: how large the residual stream is, how much
of its square one dimension holds, and the loss of the next token through a copy of the main head, as every
pivot head begins, with `pivot.norm` none and final. A line is a text, without a prompt. Its first token is
left out: in many models others attend to it when there is nothing to find, and its state is a hundred times
as large as theirs.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from prom_jax.checkpoints import pretrained as models
from prom_jax.ops.cross_entropy import cross_entropy
from prom_jax.utils import cli
from prom_jax.utils.errors import UserError


def main(argv=None):
    """Reads the command line and measures."""
    arguments = parse(argv)
    model, tokenizer = models.load(arguments.model, compute_dtype="float32")
    with open(arguments.text, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()][: arguments.lines]
    if not lines:
        raise UserError(f"{arguments.text} has no line of text")
    texts = [tokenizer(line)["input_ids"] for line in lines]
    lengths = np.array([len(ids) for ids in texts])
    tokens_BT = np.zeros((len(texts), lengths.max()), np.int32)
    for row, ids in zip(tokens_BT, texts):
        row[: len(ids)] = ids
    hiddens_NBTD = model.hidden_states(tokens_BT)
    rows = [of_block(model, layer, hidden, tokens_BT, lengths) for layer, hidden in enumerate(hiddens_NBTD)]
    predicted = int((lengths - 2).sum())
    title = f"Hidden states of {arguments.model}: {len(texts)} lines, {predicted} predicted tokens"
    measure.report(title, rows, arguments.out)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("benchmarks.hidden_states", __doc__)
    parser.add_argument("--model", required=True, help="whatever prom_jax loads")
    parser.add_argument("--text", metavar="FILE", required=True, help="a text a line")
    parser.add_argument("--lines", metavar="N", type=cli.at_least(1), default=20, help="how many are read")
    parser.add_argument("--out", metavar="FILE", help="where the table goes as JSON")
    return parser.parse_args(argv)


def of_block(model, layer: int, hidden_BTD, tokens_BT, lengths_B) -> dict:
    """The row of the table for h_`layer`; 0 is the embeddings. The texts are padded on the right."""
    positions_T = np.arange(tokens_BT.shape[1])
    known_BT = (positions_T > 0) & (positions_T < lengths_B[:, None])
    squares = np.square(np.asarray(hidden_BTD, np.float64))[known_BT]
    losses = {
        norm: float(nats(model, model.head_input(hidden_BTD, norm == "final"), tokens_BT, lengths_B))
        for norm in ("none", "final")
    }
    return {
        "after block": layer,
        "root mean square": float(np.sqrt(squares.mean())),
        "largest dimension's share": float(squares.mean(axis=0).max() / squares.mean(axis=0).sum()),
        **{f"nats, {norm}": loss for norm, loss in losses.items()},
    }


@jax.jit
def nats(model, hidden_BTD, tokens_BT, lengths_B):
    """Mean loss of the next token through the main head, which reads `hidden_BTD`."""
    positions_T = jnp.arange(tokens_BT.shape[1])
    weights_BT = ((positions_T > 0) & (positions_T < lengths_B[:, None] - 1)).astype(jnp.float32)
    labels_BT, cap = jnp.roll(tokens_BT, -1, axis=1), model.config.logit_softcap
    return cross_entropy(hidden_BTD, model.head(), labels_BT, weights_BT, 0.0, 64, cap) / weights_BT.sum()


if __name__ == "__main__":
    cli.guard(main)
