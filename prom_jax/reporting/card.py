"""The data card in files: `data_card.json`, `data_card.md` and the picture of lengths."""

from prom_jax.data import card as data_card
from prom_jax.reporting.plots import length_histogram
from prom_jax.utils.process import is_main_process
from prom_jax.utils.workdir import write_json, write_text


def write(experiment) -> dict:
    """Writes `data_card.json`, `data_card.md` and `lengths.png` into the work directory of a
    `setup.Experiment`, in process 0; returns the card (see `data.card.make`)."""
    workdir, records = experiment.workdir, experiment.records
    prepared = {part.language: part.data for part in experiment.parts}
    card = data_card.make(experiment.config, prepared, records, experiment.batches, experiment.flops)
    if not is_main_process():
        return card
    write_json(workdir / "data_card.json", card)
    write_text(workdir / "data_card.md", data_card.as_markdown(card))
    length_histogram(
        lengths(records, card["roles"]),
        experiment.config.data.seq_len,
        workdir / "lengths.png",
        {role: counts["dropped"] for role, counts in card["roles"].items()},
    )
    return card


def lengths(records, roles) -> dict:
    """Tokens of each text, by role in the primary stream and by stream in the others, in the order of `roles`
    where they are among them."""
    primary, *others = records.names
    of_roles = {role: records.streams[primary].lengths[records.roles == role] for role in roles}
    of_streams = {stream: records.streams[stream].lengths for stream in others}
    return {name: values[values > 0] for name, values in (of_roles | of_streams).items()}
