"""python -m benchmarks.convert --work=DIR [--layers=32] [--sides=NAME,…] [--tokenizer=MODEL] [--out=FILE]

Times conversions of a model of LLaMA-2-7B's shapes, each in a process of its own, and measures the anonymous
memory that it takes at most (RssAnon: pages of files, which the system may drop, are not counted):

  cp             the Hugging Face folder, copied
  from_hf        the folder to an Orbax checkpoint
  orbax_save     the same arrays saved with plain Orbax, one after the other, time to load them not counted
  to_hf          the checkpoint back to a folder, whose weights are then compared with those of the first
  orbax_restore  the checkpoint's arrays restored with plain Orbax, one after the other
  share_…        process 0's share of a mesh of eight processes of one device, from the folder (hf) or the
                 checkpoint (orbax), in bfloat16 or float32; the seven others wait
  to_gguf_…      the folder to one GGUF file of type f16, bf16 or q8_0, which is then deleted; needs a
                 tokenizer, as the format has none as plain as the one that is made up here

Needs Linux, and free disk of three times the model in DIR (41 GB with 32 layers); of twice the model without
from_hf and what comes after it.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.measure import report
from benchmarks.synthetic import llama2_7b
from benchmarks.synthetic import write as write_synthetic
from prom_jax import convert
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.description import Description
from prom_jax.models import decoder
from prom_jax.parallel import sharding

PROCESSES = 8
SHARES = ("share_hf_bfloat16", "share_hf_float32", "share_orbax_bfloat16")


def main(argv=None):
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--work", required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sides", type=lambda names: names.split(","), default=[*SIDES, *SHARES])
    parser.add_argument("--tokenizer", metavar="MODEL")
    parser.add_argument("--out", help="where the table goes as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # what a process that this one starts is to do
    arguments = parser.parse_args(argv)
    work = Path(arguments.work).absolute()
    if arguments.side:
        one_side(arguments.side, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    kept = (work / "hf").exists()
    if not kept:
        write_synthetic(work / "hf", llama2_7b(arguments.layers), arguments.tokenizer)
    rows = [measured(side, work) for side in arguments.sides]
    if (work / "back").exists():
        check_same(work / "hf", work / "back")
    for name in ("orbax", "back", *([] if kept else ["hf"])):
        shutil.rmtree(work / name, ignore_errors=True)
    report(f"conversion of {arguments.layers} layers of LLaMA-2-7B's shapes", rows, arguments.out)


def measured(side: str, work: Path) -> dict:
    """A row of the table: what the side says of itself, and its largest anonymous memory."""
    os.sync()  # what was written before is not to be paid for now
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COORDINATOR": f"localhost:{free_port()}"}
    command = [sys.executable, "-m", "benchmarks.convert", f"--work={work}", f"--side={side}"]
    waiting = [
        subprocess.Popen(command, env=environment | {"PROCESS": str(i)})
        for i in range(1, PROCESSES)
        if side in SHARES
    ]
    process = subprocess.Popen(command, env=environment | {"PROCESS": "0"}, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    results = [line for line in process.stdout.read().splitlines() if line.startswith("{")]
    for other in waiting:
        if process.returncode:
            other.kill()
        other.wait()
    if process.returncode:
        raise SystemExit(f"{side} ended with status {process.returncode}")
    row = {"side": side, **json.loads(results[-1]), "peak GiB": peak / 2**30}
    print(row, flush=True)
    return row


def anonymous(pid: int) -> int:
    """Bytes of resident anonymous memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def one_side(side: str, work: Path):
    """Does what the name says, and prints the gigabytes of weights that it is about and its seconds."""
    if side in SHARES:
        return share(side, work)
    seconds = to_gguf(work, side) if side.startswith("to_gguf_") else SIDES[side](work)
    tell(sum(path.stat().st_size for path in (work / "hf").glob("*.safetensors")), seconds)


def tell(num_bytes: int, seconds: float):
    """The line that `measured` reads."""
    print(json.dumps({"GB": num_bytes / 1e9, "seconds": seconds}), flush=True)


def cp(work: Path) -> float:
    """Copies the folder."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", work / "hf", work / "copy"], check=True)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(work / "copy")
    return seconds


def from_hf(work: Path) -> float:
    """To a checkpoint."""
    began = time.perf_counter()
    convert.from_hf(work / "hf", work / "orbax")
    os.sync()
    return time.perf_counter() - began


def to_hf(work: Path) -> float:
    """Back to a folder."""
    began = time.perf_counter()
    convert.to_hf(work / "orbax", work / "back")
    os.sync()
    return time.perf_counter() - began


def to_gguf(work: Path, side: str) -> float:
    """To one file."""
    began = time.perf_counter()
    convert.to_gguf(work / "hf", work / "model.gguf", side.removeprefix("to_gguf_"))
    os.sync()
    seconds = time.perf_counter() - began
    (work / "model.gguf").unlink()
    return seconds


def check_same(*folders: Path):
    """Fails if the weights of two folders differ in a bit."""
    before, after = (models.open_source(folder)[0] for folder in folders)
    whole = lambda reader, name: reader.read(name, (slice(None),) * len(reader.shape(name)))
    same = lambda name: np.array_equal(
        whole(before, name).view(np.uint16), whole(after, name).view(np.uint16)
    )
    if before.names != after.names or not all(map(same, before.names)):
        raise SystemExit("to_hf did not give back what from_hf was given")


def save(work: Path) -> float:
    """With plain Orbax; seconds without loading."""
    seconds = 0.0
    params = weights.lazy_params(models.open_source(work / "hf")[0])
    for path, param in jax.tree.leaves_with_path(params):
        array = jax.device_put(param.read((slice(None),) * len(param.shape)))
        array.block_until_ready()
        began = time.perf_counter()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(work / "plain", {jax.tree_util.keystr(path): array})
        os.sync()
        seconds += time.perf_counter() - began
        shutil.rmtree(work / "plain")
        del array
    return seconds


def restore(work: Path) -> float:
    """With plain Orbax."""
    seconds = 0.0
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    description = Description.read(work / "orbax")
    model = decoder.abstract(description.config, heads=description.heads, param_dtype="bfloat16")
    params = decoder.to_params(model)
    for path, param in jax.tree.leaves_with_path(params):
        began = time.perf_counter()
        leaf = jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=device)
        for entry in reversed(path):
            leaf = {entry.key: leaf}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arguments = ocp.args.PyTreeRestore(
                leaf,
                restore_args=ocp.checkpoint_utils.construct_restore_args(leaf),
                partial_restore=True,
            )
            jax.block_until_ready(checkpointer.restore(work / "orbax" / "0" / "params", args=arguments))
        seconds += time.perf_counter() - began
    return seconds


def share(side: str, work: Path):
    """One process's part of the model; all others only wait."""
    _, source, dtype = side.split("_")
    process = int(os.environ["PROCESS"])
    address = os.environ["COORDINATOR"]
    jax.distributed.initialize(address, PROCESSES, process, shutdown_timeout_seconds=3600)
    mesh = sharding.make_mesh(fsdp=PROCESSES)
    began = time.perf_counter()
    if process == 0:
        params = weights.load_params(models.open_source(work / source)[0], mesh, dtype=dtype)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - began
        held = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(params))
        tell(held, seconds)
    jax.distributed.shutdown()  # waits for all


SIDES = {"cp": cp, "from_hf": from_hf, "orbax_save": save, "to_hf": to_hf, "orbax_restore": restore}

if __name__ == "__main__":
    main()
