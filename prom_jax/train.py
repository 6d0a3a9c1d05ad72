"""python -m prom_jax.train --config=configs/th.py[:variant] [--workdir=DIR] [--dry_run]

Adapts a model to a language. The work directory, by default runs/<config>[-variant], gets the records,
checkpoints, metrics.jsonl, TensorBoard events, summary.json and the result, hf/. Run the same command again
to go on after a stop.
"""

import argparse
import contextlib
import dataclasses
import itertools
import platform
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import jax
import numpy as np
import optax
from rich.table import Table

from prom_jax.analysis import regulation
from prom_jax.checkpoints import hub, peft
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.adapter import AdapterReader, base_of, with_adapter
from prom_jax.checkpoints.description import Description, describe
from prom_jax.checkpoints.training import Checkpoints
from prom_jax.config import SOURCES
from prom_jax.data import card
from prom_jax.evaluation import samples
from prom_jax.evaluation.heldout import HeldOut
from prom_jax.models import decoder
from prom_jax.models.blocks import Compute
from prom_jax.parallel import flags, multihost, sharding
from prom_jax.reporting.card import write as write_card
from prom_jax.reporting.plots import learning_curves
from prom_jax.training import balance, budget
from prom_jax.training.objective import head_chunks
from prom_jax.training.optimizer import abstract_state, make_optimizer, make_schedule
from prom_jax.training.setup import BaseModel, Experiment, open_base, resolve
from prom_jax.training.step import divide, make_term_norms, make_update, merge_params, split_params
from prom_jax.training.trackers import MetricsLog, find_trackers
from prom_jax.utils import cli, command
from prom_jax.utils.console import console, progress
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import REQUEUE, is_main_process
from prom_jax.utils.workdir import CONFIG_FILE, recorded_versions, write_config, write_json

BEFORE_BASE = -1  # the step before the base model's evaluation, which is step 0
SPEEDS = ("tokens_per_second", "model_flops_per_second")  # of each update
# Freed memory is kept for the next update where an update needs no more than this share of what there is.
MOST_KEPT = 0.25


def train(config, workdir, dry_run: bool = False) -> dict:
    """Runs a whole adaptation, or what is left of it.

    Args:
      config: see `prom_jax.config`.
      workdir: where everything goes.
      dry_run: tell the cost and stop.

    Returns:
      The content of `summary.json`; empty for a dry run.

    Raises:
      UserError: for input that cannot be used, or a loss that is not finite.
    """
    started = time.time()
    if config.export.hub:
        hub.check_can_push(config.export.hub)  # before the time is spent
    trackers = find_trackers(config.trackers)
    job = plan(config, Path(workdir))
    workdir = job.workdir
    with jax.set_mesh(job.mesh):
        if dry_run:
            compile_update(job)
            return {}
        checkpoints = open_checkpoints(job)
        with ThreadPoolExecutor(1) as executor:  # weights are read while the update is compiled
            needs_base = job.is_frozen or not checkpoints.latest()
            base = executor.submit(load, job) if needs_base else None
            update, abstract = compile_update(job)
            term_norms = compile_term_norms(job, abstract[0])
        start, state = checkpoints.resume(params=job.kept(abstract[0]), opt_state=abstract[1])
        describe_checkpoints(job, checkpoints)
        if state is None:
            state = init_state(job, base.result() if base else load(job), abstract)
        params, opt_state = state
        params = merge_params(params, base.result()) if base else params
        log = MetricsLog(workdir, start or BEFORE_BASE, trackers, job.identity)
        with contextlib.closing(log):
            begun = begun_with(workdir) if start else {}
            write_config(workdir, job.identity | {"versions": begun or versions()})
            if not start:
                show_data(job, log)
                evaluate(job, params, log, 0)
                write_samples(job, params, "base")
            params = loop(job, update, term_norms, params, opt_state, checkpoints, log, start)
            write_samples(job, params, "adapted")
            export(job, params, log)
            checkpoints.close()  # only now: a last save that failed must not keep the result back
            return report(job, log, time.time() - started)


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    return {"python": platform.python_version()} | cli.versions("flax", "optax", "orbax-checkpoint")


def begun_with(workdir: Path) -> dict[str, str]:
    """The versions that a run was begun with, empty if unknown; a warning tells what may be another run's."""
    begun, now = recorded_versions(workdir), versions()
    if begun is None:
        console.print(
            f"WARNING   {workdir} has checkpoints and no {CONFIG_FILE}: whether they are of a run with these "
            "settings cannot be told; if not, remove them or give another --workdir"
        )
        return {}
    for name, version in begun.items():
        if version != now.get(name):
            console.print(
                f"WARNING   the run was begun with {name} {version}, now {now.get(name)}: numbers may differ"
            )
    return begun


@dataclasses.dataclass(frozen=True)
class Job(Experiment):
    """An experiment on a mesh, before its weights are loaded to train on."""

    mesh: jax.sharding.Mesh
    model: decoder.Decoder  # shapes alone
    held_out: list[HeldOut]
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @property
    def exports_adapter(self) -> bool:
        """Whether adapters are written in PEFT's format."""
        return self.is_frozen and self.config.export.adapter

    @property
    def frozen_base(self) -> BaseModel:
        """The model that adapters are trained for, without those that training goes on from."""
        reader = base_of(self.base.reader, self.lora)
        return self.base if reader is self.base.reader else dataclasses.replace(self.base, reader=reader)

    @property
    def base_source(self) -> str:
        """Where that model is."""
        return self.config.model if self.frozen_base is self.base else self.base.reader.adapter.base

    def split(self, params) -> tuple[dict, dict]:
        """The parameters that are trained, and those that are frozen."""
        return split_params(params, self.model, self.method)

    def kept(self, params) -> dict:
        """The parameters that checkpoints hold: all but those that stay the base model's."""
        return divide(params, lambda path: not self.model.is_frozen(path[-1]))[0]

    @property
    def chunks(self) -> dict[str, int]:
        """Of loss tokens, by stream."""
        shards = self.config.batch.accumulation * sharding.num_batch_shards(self.mesh)
        return head_chunks(self.batches, shards)


def plan(config, workdir: Path) -> Job:
    """Mesh, model and data, with a line on each; writes nothing but records, card and regulation."""
    mesh = sharding.make_mesh(**config.mesh)
    base = open_base(config, workdir)
    experiment = resolve(config, workdir, base, regulation.measured(config, base, workdir, mesh))
    method, batches = experiment.method, experiment.batches
    compute = Compute(config.compute_dtype or models.default_compute_dtype(), config.remat, config.attention)
    compute.check_platform()
    model = decoder.abstract(
        base.config,
        compute=compute,
        heads=method.heads,
        exits=method.exits,
        param_dtype=config.optimizer.dtype,
        lora=experiment.lora,
    )
    made = write_card(experiment)
    for line in card.lines(made):
        console.print(f"data      {line}")
    for sentence in card.warnings(made):
        console.print(f"WARNING   {sentence}")
    console.print(
        f"steps     {batches.num_steps} ({batches.steps_per_epoch} an epoch), {experiment.flops:.3g} model "
        f"FLOPs, {experiment.flops / batches.num_steps:.3g} a step"
    )
    console.print(
        f"mesh      {sharding.describe(mesh)}: "
        f"{decoder.num_parameters(model):,} parameters{' with the pivot head' * bool(method.heads)}, "
        f"{trained_number(model, method)}computed in {compute.dtype}"
    )
    rows = config.batch.sequences // config.batch.accumulation  # what fits in training fits in evaluation
    held_out = [
        HeldOut(model, method, mesh, records, sequences=rows, seq_len=config.data.seq_len, prefix=prefix)
        for part in experiment.parts
        for prefix, records in (
            (part.prefix, part.data.holdout),
            (f"{part.prefix}text_", part.data.text),
        )
        if records is not None
    ]
    schedule = make_schedule(
        config.optimizer.learning_rate,
        config.optimizer.warmup_ratio,
        config.optimizer.schedule,
        batches.num_steps,
    )
    optimizer = make_optimizer(
        schedule, config.optimizer.weight_decay, config.optimizer.clip, config.optimizer.dtype
    )
    return Job(
        **vars(experiment),
        mesh=mesh,
        model=model,
        held_out=held_out,
        schedule=jax.jit(schedule),  # one small program, not one an operation
        optimizer=optimizer,
    )


def trained_number(model: decoder.Decoder, method) -> str:
    """Of how many parameters adapters are trained, for people; '' where all are."""
    trained, frozen = split_params(decoder.to_params(model), model, method)
    number = sum(x.size for x in jax.tree.leaves(trained))
    return f"{number:,} of them trained, " if frozen else ""


def compile_update(job: Job):
    """The compiled update, and all parameters and the optimizer's state, in shapes with their shardings; says
    what memory it needs.

    Besides `make_update`'s arguments it takes whether to stop, from each process, and its metrics have
    `stop`: whether any of them asked. So a signal that reaches one process stops all after the same step.
    """
    parts = job.config.batch.accumulation
    params = weights.abstract_params(job.model, job.mesh)
    trained, frozen = job.split(params)
    opt_state = abstract_state(job.optimizer, trained, job.mesh)
    step = make_update(job.model, job.method, job.optimizer, parts, job.batches.appended, job.chunks)

    def update(trained, opt_state, batch, stops, frozen):
        trained, opt_state, metrics = step(trained, opt_state, batch, frozen)
        return trained, opt_state, metrics | {"stop": stops.any()}

    batch = sharding.place_rows(job.mesh, job.batches[0], parts)
    stops = sharding.by_process(job.mesh, False)
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(trained, opt_state, batch, stops, frozen)
    compiled = lowered.compile()
    needed = budget.device_bytes(compiled)
    console.print(f"memory    {budget.summary(needed)}")
    if sum(needed.values()) > MOST_KEPT * budget.available_bytes():
        command.return_freed_memory()
    return compiled, (params, opt_state)


def compile_term_norms(job: Job, params):
    """The compiled function (trained, batch, frozen) → {'grad_norm_<name>': the norm of the gradient of a
    part of the loss}; empty for a loss of one part, whose gradient is the update's.

    Args:
      params: abstract.
    """
    parts = job.config.batch.accumulation
    term_norms = make_term_norms(job.model, job.method, parts, job.batches.appended, job.chunks)

    def named(trained, batch, frozen):
        return {f"grad_norm_{name}": norm for name, norm in term_norms(trained, batch, frozen).items()}

    def none(trained, batch, frozen):
        return {}

    if sum(len(term.names) for term in job.method.terms) == 1:
        return none
    batch = sharding.place_rows(job.mesh, job.batches[0], parts)
    trained, frozen = job.split(params)
    return jax.jit(named).lower(trained, batch, frozen).compile()


def open_checkpoints(job: Job) -> Checkpoints:
    """Those of the run, with the policy of the configuration."""
    c = job.config.checkpoint
    return Checkpoints(c.directory or job.workdir / "checkpoints", c.keep, c.keep_best, c.keep_every)


def load(job: Job) -> dict:
    """Parameters of the base model and new adapters, sharded."""
    return weights.load_params(
        with_adapter(job.base.reader, job.lora, job.model.heads, job.config.seed),
        job.mesh,
        heads=job.model.heads,
        exits=job.model.exits,
        dtype=job.config.optimizer.dtype,
        lora=job.lora,
    )


def describe_checkpoints(job: Job, checkpoints: Checkpoints):
    """Writes what the checkpoints are next to them, at each start: a file may be lost, a base model moved."""
    base = None
    if job.is_frozen:
        base = {"source": job.base_source, "fingerprint": job.frozen_base.fingerprint}
    dtype = np.dtype(job.base.reader.dtype).name
    exits = job.method.exits
    description = Description(job.base.config, job.model.heads, dtype, job.details, exits, job.lora, base)
    describe(checkpoints.directory, description, job.base.tokenizer)


def init_state(job: Job, params: dict, abstract):
    """The parameters and a new optimizer state, sharded as the abstract ones."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract[1])
    init = jax.jit(job.optimizer.init, out_shardings=shardings)
    return params, init(job.split(params)[0])


def loop(
    job: Job, update, term_norms, params, opt_state, checkpoints: Checkpoints, log: MetricsLog, start: int
):
    """Updates from `start` to the end, with evaluations and checkpoints; returns the parameters.

    Raises:
      UserError: for a loss or gradient that is not finite; earlier checkpoints stay.
      SystemExit: with REQUEUE, after a save, on SIGTERM, SIGINT or SIGUSR1.
    """
    config, num_steps = job.config, job.batches.num_steps
    told = set()  # kinds of warnings
    trained, frozen = job.split(params)

    def is_due(step, every):
        return step == num_steps or (every and step % every == 0)

    upcoming = batch_iterator(job, start)
    batch, tokens = next(upcoming, (None, 0))
    with progress(num_steps, start) as show, caught_signals() as stopping:
        for step in range(start + 1, num_steps + 1):
            multihost.progress(f"step {step}")
            measured = step == 1 or (config.eval.every and step % config.eval.every == 0)
            norms = jax.device_get(term_norms(trained, batch, frozen)) if measured else {}
            between = config.eval.every, config.checkpoint.every
            if measured or any(is_due(step - 1, every) for every in between):
                command.trim_freed_memory()
            begun = time.perf_counter()
            stops = sharding.by_process(job.mesh, bool(stopping))
            with jax.transfer_guard("disallow"):
                trained, opt_state, metrics = update(trained, opt_state, batch, stops, frozen)
            done, (batch, tokens) = tokens, next(upcoming, (None, 0))  # while the devices work
            metrics = jax.device_get(metrics)
            stop = metrics.pop("stop") and step < num_steps
            seconds = time.perf_counter() - begun
            check_finite(job, metrics, step, checkpoints)
            metrics = present(metrics | norms)
            metrics["learning_rate"] = job.schedule(step - 1)
            metrics["tokens_per_second"] = done / seconds
            metrics["model_flops_per_second"] = job.flops / num_steps / seconds
            log.write(step, metrics)
            show(step, f"{balance.line(metrics)}  {done / seconds:,.0f} tokens/s")
            for kind, sentence in balance.warnings(job.method, metrics, config.optimizer.clip).items():
                if kind not in told:
                    console.print(f"WARNING   step {step}: {sentence}")
                told.add(kind)
            params = merge_params(trained, frozen)
            if is_due(step, config.eval.every):
                evaluate(job, params, log, step)
            if is_due(step, config.checkpoint.every) or stop:
                loss = held_out_loss(job, log.evaluation(step))
                checkpoints.save(step, loss, params=job.kept(params), opt_state=opt_state)
            if stop:
                checkpoints.close()
                console.print(f"stopped after step {step}, which is saved; run the same command to go on")
                raise SystemExit(REQUEUE)
    multihost.progress(None)
    return params


def present(metrics: dict) -> dict:
    """The metrics without those of streams that an update has none of."""
    absent = [
        key.removeprefix("weight_")
        for key, value in metrics.items()
        if key.startswith("weight_") and not value
    ]
    hidden = {f"{kind}_{name}" for name in absent for kind in ("loss", "weight", "grad_norm")}
    return {key: value for key, value in metrics.items() if key not in hidden}


def check_finite(job: Job, metrics: dict, step: int, checkpoints: Checkpoints):
    """Raises UserError if the step went wrong, before it reaches a record or a checkpoint."""
    norms = {name: float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")}
    if not all(map(np.isfinite, norms.values())):
        checkpoints.close()
        raise UserError(
            f"step {step}: {', '.join(f'{name} {value:g}' for name, value in norms.items())}; the last good "
            f"checkpoint is step {checkpoints.latest() or 'none'} in {checkpoints.directory}: lower "
            "optimizer.learning_rate, set optimizer.clip, or look at the data, with another --workdir"
        )


def batch_iterator(job: Job, start: int):
    """Batches on the mesh from step `start`, with their numbers of real tokens."""
    parts, shapes = job.config.batch.accumulation, job.batches.shapes
    here = {stream: sharding.local_rows(job.mesh, rows, parts) for stream, (rows, _) in shapes.items()}
    batches = job.batches.iterate(start, here)
    for step in range(start, len(job.batches)):
        try:
            batch = next(batches)
        except Exception as error:  # of whatever reads and decodes
            raise UserError(
                f"the data of step {step + 1} cannot be read ({type(error).__name__}: {error}): fix or "
                f"remove {job.workdir}/records, and run the same command to go on"
            ) from error
        yield sharding.place_rows(job.mesh, batch, parts), job.batches.tokens(step)


@contextlib.contextmanager
def caught_signals():
    """A list that fills when SIGTERM, SIGINT or SIGUSR1 comes, so that the step under way can be saved.

    mpirun passes SIGUSR1 on; of SIGTERM it makes a SIGKILL within seconds. Outside of the main thread no
    signal can be caught, and none is.
    """
    caught = []

    def catch(number, _):
        caught.append(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if main else ()
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_data(job: Job, log: MetricsLog):
    """The card of the data, to the trackers."""
    if is_main_process():
        log.text("data card", (job.workdir / "data_card.md").read_text(encoding="utf-8"))
        log.image("lengths", job.workdir / "lengths.png")


def evaluate(job: Job, params, log: MetricsLog, step: int):
    """Held-out losses, on record and in a line."""
    results = {key: value for held_out in job.held_out for key, value in held_out(params).items()}
    if results:
        log.write(step, results)
        numbers = (
            f"{key.removeprefix('eval_')} {value:.3f}" for key, value in results.items() if "bits" in key
        )
        console.print(f"step {step:>5}  held out: {', '.join(numbers)}")


def held_out_loss(job: Job, results: dict | None) -> float | None:
    """What checkpoints are compared by: the held-out loss of the target text, the mean of all languages'."""
    keys = [f"eval_{part.prefix}target_nats" for part in job.parts]
    return statistics.fmean(results[key] for key in keys) if results and set(keys) <= set(results) else None


def write_samples(job: Job, params, name: str):
    """Sample answers of the base or adapted model in each language, into a file."""
    answers = []
    for part in job.parts:
        if job.config.eval.samples and part.data.holdout is not None:
            model, number = decoder.with_params(job.model, params), job.config.eval.samples
            given = samples.answer(model, job.base.tokenizer, part.data.holdout, number)
            answers += [{"language": part.language} | answer for answer in given]
    if answers:
        write_json(job.workdir / f"samples_{name}.json", answers)


def export(job: Job, params, log: MetricsLog):
    """The result as a Hugging Face directory, pushed to the hub if that is asked for."""
    base, final = log.evaluation(0) or {}, log.evaluation(job.batches.num_steps) or {}
    names = [key for key in final if key != "step" and key in base]
    results = {key.removeprefix("eval_"): (base[key], final[key]) for key in names}
    license = models.license_of(job.config.model)
    used = (part.config[group][key] for part in job.parts for group, key in SOURCES if group == "data")
    card = job.details | {"data": list(dict.fromkeys(itertools.chain(*used)))}
    card |= {key: value for key, value in (("results", results), ("license", license)) if value}
    model = decoder.with_params(job.model, params)
    models.save_hf(
        model,
        job.base.tokenizer,
        job.workdir / "hf",
        dtype=job.config.export.dtype or job.base.reader.dtype,
        card=card,
        template=job.chat_template,
        base=job.frozen_base.reader if job.is_frozen else None,
    )
    if job.exports_adapter:
        peft.save(
            cast(AdapterReader, weights.ParamsReader(model)),  # where adapters are trained
            job.base.tokenizer,
            job.workdir / "adapter",
            base=job.base_source,
            dtype=job.config.export.dtype or "float32",
            chat_template=job.chat_template,
            card=card,
        )
    if job.config.export.hub and is_main_process():
        push(job)


def push(job: Job):
    """The exports to the hub, adapters into a repository of their own."""
    folders = {"hf": job.config.export.hub}
    if job.exports_adapter:
        folders["adapter"] = f"{job.config.export.hub}-lora"
        if Path(job.base_source).exists():
            console.print(
                f"WARNING   {job.base_source}, which the adapter is for, is a path of this machine: write "
                "where others have it into base_model_name_or_path of its adapter_config.json"
            )
    for folder, repository in folders.items():
        console.print(f"pushed    {hub.push(job.workdir / folder, repository)}")


def report(job: Job, log: MetricsLog, seconds: float) -> dict:
    """Writes summary.json and the learning curves and prints before and after, in process 0; returns the
    summary."""
    num_steps = job.batches.num_steps
    steps = [row for row in log.rows if "loss" in row]
    speeds = {key: statistics.median(row[key] for row in steps) for key in SPEEDS}
    base, final = log.evaluation(0), log.evaluation(num_steps)
    probes = {part.prefix.rstrip("_"): part.regulation.measured for part in job.parts}
    summary = job.details | {
        "regulation_probe": probes.get("", probes),
        "base": base,
        "final": final,
        "loss": steps[-1]["loss"],
        **speeds,
        "seconds": seconds,
        "export": str(job.workdir / "hf"),
    }
    if job.exports_adapter:
        summary["adapter"] = str(job.workdir / "adapter")
    if not is_main_process():
        return summary
    write_json(job.workdir / "summary.json", summary)
    learning_curves(log.rows, job.workdir / "curves.png")
    log.image("curves", job.workdir / "curves.png")
    if base and final:
        rows = [
            {
                "held out": key.removeprefix("eval_").replace("_", " "),
                "before": f"{base[key]:.3f}",
                "after": f"{final[key]:.3f}",
                "change": f"{final[key] / base[key] - 1:+.1%}",
            }
            for key in final
            if key != "step" and key in base
        ]
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
        log.table("held out", rows)
    if (job.workdir / "samples_base.json").exists():
        pairs = samples.pairs(job.workdir / "samples_base.json", job.workdir / "samples_adapted.json")
        samples.show(pairs)
        log.table("samples", pairs)
    console.print(
        f"\n{summary['tokens_per_second']:,.0f} tokens/s, {summary['model_flops_per_second'] / 1e9:,.0f} "
        f"model GFLOP/s, {seconds:,.0f} s in all\ncurves: {job.workdir}/curves.png\n"
        f"result: {summary['export']} (load it with transformers or prom_jax.load)"
        + f"\nadapter: {summary.get('adapter')} (load it with peft or prom_jax.load)"
        * job.exports_adapter
    )
    return summary


def main(argv=None):
    """Reads the command line and trains."""
    arguments = parse(argv)
    command.keep_freed_memory()
    command.import_tensorboard()
    with flags.processes(arguments):
        train(arguments.config, arguments.workdir, arguments.dry_run)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.train", __doc__)
    parser.add_run()
    parser.add_argument("--dry_run", action="store_true", help="print steps, FLOPs and memory, then stop")
    flags.add_processes(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.guard(main)
