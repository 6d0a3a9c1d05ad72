"""Gradient interference: do two kinds of text that a method trains on pull a layer in one direction?

Measured as the cosine between the gradients of two batches over the trained parameters of one block
(attention, feed-forward and norms, or their adapters; embeddings and heads are in none), under the method's
own loss (the paper's figure 2).
What is compared is what meets in that loss:

  xllama2   English and target text, both at h_N through the main head
  prom      English at h_n through the pivot head, target text at h_N through the main head
  bactrian  no English text at all: target-language instructions and translations, whose prompts hold English
            sentences; both at h_N through the main head

Target text is instructions and translations together, as they are in training. All methods see the same
examples. A cosine knows no scale: neither λ nor the number of tokens that a loss is divided by matters.

Under PROM English has no gradient above block n: the last layers are the target language's alone, and nothing
interferes there. A zero gradient has no direction and so no cosine (which is not a cosine of 0): it is None,
and n is the last layer that both reach.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.analysis.statistics import interval, resampled_means
from prom_jax.data.loader import Batches
from prom_jax.data.records import Records
from prom_jax.models import decoder
from prom_jax.models.blocks import Blocks
from prom_jax.models.inputs import Rows
from prom_jax.parallel.sharding import BATCH, constrain, constrain_params
from prom_jax.training.objective import Method, Texts, TokenLoss
from prom_jax.utils.errors import UserError

# Which batches.


def draw(batches: Batches, records: Records, methods, number: int) -> list[int]:
    """The first `number` steps of a run whose batches hold everything that `methods` compare.

    Raises:
      UserError: the records hold none of something, or too few batches hold all.
    """
    compared = [(method, texts) for method in methods for texts in method.compared]
    everything = np.arange(len(records))
    for method, texts in compared:
        if not _tokens(records, everything, texts):
            raise UserError(
                f"method {method.name!r} is measured on {' and '.join(t.name for t in method.compared)}, and "
                f"the data hold none of the {texts.name}: set {texts.source}, or leave {method.name} out of "
                "--methods"
            )

    def holds(step, texts):
        taken = batches.slots(step, texts.stream)[0] if texts.stream in batches.shapes else everything[:0]
        return _tokens(records, taken, texts) > 0

    steps = [step for step in range(len(batches)) if all(holds(step, texts) for _, texts in compared)]
    if not 0 < number <= len(steps):
        raise UserError(
            f"--batches={number}: expected 1 to {len(steps)}, as many as hold all that is compared; for "
            "more, lower batch.sequences or give more data"
        )
    return steps[:number]


def _tokens(records: Records, examples: np.ndarray, texts: Texts) -> int:
    """Loss tokens of some texts in examples."""
    if texts.stream not in records.streams:
        return 0
    weights = records.streams[texts.stream].weights[examples]
    return int(weights[_has_role(records, examples, texts)].sum())


def _has_role(records: Records, examples: np.ndarray, texts: Texts) -> np.ndarray:
    return np.isin(records.roles[examples], texts.roles)


def only(batch: dict, batches: Batches, records: Records, step: int, texts: Texts) -> dict:
    """The rows of a batch in which some texts alone have a loss. The others stay, unseen: packing isolates
    them.

    Args:
      batch: `batches[step]`.
      batches, records: of the run.
      step: of the batch.
      texts: that have a loss.

    Returns:
      Numpy arrays as in `data.loader`, [R, T].
    """
    examples, rows, offsets, lengths = batches.slots(step, texts.stream)
    has_loss = np.zeros_like(batch[texts.stream]["weights"])
    here = _has_role(records, examples, texts)
    for row, offset, length in zip(rows[here], offsets[here], lengths[here]):
        has_loss[row, offset : offset + length] = 1
    return batch[texts.stream] | {"weights": batch[texts.stream]["weights"] * has_loss}


# The gradients.


@functools.partial(jax.jit, static_argnames="method")
def inner_products(model: decoder.Decoder, rows: tuple, *, method: Method):
    """Inner products of the gradients of two batches over the parameters of each block that both reach.

    Both go back through the blocks side by side and are summed up block by block, so that the parameters'
    gradients of one block are all that is ever in memory; of the way forward, every block's input is kept.
    For SmolLM2-135M and the demo's batches of xLLaMA2(t+e) that is 0.23 GiB of temporaries, where two trees
    of gradients and what it takes to make them are 1.47 GiB.

    Args:
      model: with its parameters.
      rows: of each of the method's `compared` texts, as in `data.loader`.
      method: decides where they leave, and through which head.

    Returns:
      Float32 [L, 3]: g₁·g₂, g₁·g₁ and g₂·g₂ in blocks 1 … L, the last one that both reach.
    """
    terms = [_term(method, texts.stream) for texts in method.compared]
    depth = min(term.layer or model.config.num_hidden_layers for term in terms)
    bounds = decoder.stack_bounds(model.config.num_hidden_layers, model.exits)
    shared = [stack for stack, (_, last) in zip(model.stacks, bounds) if last <= depth]
    batches = [Rows(part["tokens"], part["positions"], part["segments"]) for part in rows]
    contexts = [model.context(batch) for batch in batches]
    states, inputs = zip(
        *(_forward(shared, model.embed(batch.tokens), context) for batch, context in zip(batches, contexts))
    )
    gradients = tuple(
        jax.grad(_rest)(x, model, len(shared), term, part, context)
        for x, term, part, context in zip(states, terms, rows, contexts)
    )

    def back(gradients, layer):
        (block, kind), *entered = layer
        of_block, of_input = zip(
            *(_back(block, kind, model, *each) for each in zip(entered, contexts, gradients))
        )
        products = jnp.stack([_dot(of_block[i], of_block[j]) for i, j in ((0, 1), (0, 0), (1, 1))])
        return of_input, products

    products = []
    for stack, *entered in reversed(list(zip(shared, *inputs))):
        layers = (stack, jnp.asarray(stack.kinds))
        gradients, of_stack = jax.lax.scan(back, gradients, (layers, *entered), reverse=True)
        products.append(of_stack)
    return constrain(jnp.concatenate(products[::-1]))


def _term(method: Method, stream: str) -> TokenLoss:
    """The loss of a stream."""
    return next(t for t in method.terms if isinstance(t, TokenLoss) and stream in t.streams)


def _block(block: Blocks, kind, x_BTD, context):
    return block.run(block.unsharded(x_BTD.dtype), x_BTD, context, kind)[0]


def _forward(stacks: list[Blocks], x_BTD, context):
    """The last block's output, and the inputs of each stack's blocks, [n, B, T, D]."""

    def forward(x, layer):
        return _block(*layer, x, context), x

    inputs = []
    for stack in stacks:
        x_BTD, entered = jax.lax.scan(forward, x_BTD, (stack, jnp.asarray(stack.kinds)))
        inputs.append(entered)
    return x_BTD, inputs


def _rest(x_BTD, model: decoder.Decoder, depth: int, term: TokenLoss, rows: dict, context):
    """The sum of token losses of a batch, from the output of the stack number `depth`."""
    bounds = decoder.stack_bounds(model.config.num_hidden_layers, model.exits)
    for stack, (_, last) in list(zip(model.stacks, bounds))[depth:]:
        if last <= (term.layer or model.config.num_hidden_layers):
            (x_BTD,), _, _ = stack.scan([x_BTD], [context])
    return term.read(model, x_BTD, rows)


def _back(block: Blocks, kind, model, x_BTD, context, gradient_BTD):
    """Gradients of one block's parameters that are trained, as a dict, and of its input."""
    params = decoder.to_params(block)
    trained = {name: value for name, value in params.items() if not model.is_frozen(name)}

    def run(trained, x):
        return _block(decoder.with_params(block, params | trained), kind, x, context)

    _, backward = jax.vjp(run, trained, x_BTD)
    of_block, of_input = backward(gradient_BTD)
    axes = decoder.param_axes(model.config, lora=model.lora)
    return constrain_params(of_block, axes), constrain(of_input, BATCH)


def _dot(one: dict, other: dict):
    """In full float32, which accelerators do not give to matrix products by default."""
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


# What it comes to.


def cosines(products) -> np.ndarray:
    """float64 [L], from `inner_products`."""
    both, one, other = np.asarray(products, np.float64).T
    return both / np.sqrt(one * other)


def summary(method: Method, values: np.ndarray, num_layers: int, seed: int) -> dict:
    """A method's cosines [batches, L] in JSON's types: by layer, 1 … N, with mean and 95 % bootstrap interval
    over batches. Above L there are none."""
    lows, highs = interval(resampled_means(values, seed))
    reached = values.shape[1]
    layers = [
        {"mean": float(of_layer.mean()), "interval": [float(low), float(high)], "values": of_layer.tolist()}
        for of_layer, low, high in zip(values.T, lows, highs)
    ]
    absent = {"mean": None, "interval": None, "values": None}
    return {
        "compared": [texts.name for texts in method.compared],
        "last_shared_layer": reached,
        "layers": [
            {"layer": i} | entry for i, entry in enumerate(layers + [absent] * (num_layers - reached), 1)
        ],
    }
