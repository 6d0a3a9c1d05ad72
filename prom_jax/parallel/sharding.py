"""The mesh, which axis of each array lies along which of its axes, and how arrays get there."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prom_jax.utils.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Rows of a batch are spread over both of these.
BATCH = ("data", "fsdp")

# The dimensions of each parameter, last ones first named; a leading layer axis is never split.
_DIMENSIONS = {
    "embed_tokens": ("tensor", "fsdp"),
    "lm_head": ("tensor", "fsdp"),
    "pivot_head": ("tensor", "fsdp"),
    "q_proj": ("tensor", "fsdp"),
    "k_proj": ("tensor", "fsdp"),
    "v_proj": ("tensor", "fsdp"),
    "o_proj": ("fsdp", "tensor"),
    "gate_proj": ("tensor", "fsdp"),
    "up_proj": ("tensor", "fsdp"),
    "down_proj": ("fsdp", "tensor"),
    "input_layernorm": ("fsdp",),
    "post_attention_layernorm": ("fsdp",),
    "norm": ("fsdp",),
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """A mesh of all devices; at most one size may be -1, which takes the rest.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and given > 0 and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if -1 in sizes or min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh.data={data} mesh.fsdp={fsdp} mesh.tensor={tensor} does not match the {len(devices)} "
            "devices here: their product must be that number, and one of them may be -1 for the rest"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def describe(mesh) -> str:
    """The mesh's shape and devices, for people."""
    processes = f" in {jax.process_count()} processes" * (jax.process_count() > 1)
    return f"{dict(mesh.shape)} on {jax.device_count()} × {jax.devices()[0].device_kind}{processes}"


def param_sharding(mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lies. An axis that the mesh does not divide stays whole on every device.

    Args: path: its place in the parameter tree, such as ('lower', 'q_proj'); shape: its global shape.
    """
    dimensions = _DIMENSIONS[path[-1]]
    spec = [None] * (len(shape) - len(dimensions)) + list(dimensions)
    spec = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape)]
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x, *axes):
    """Asks for `x` to be split along mesh axes, dimension by dimension; without a mesh, nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def constrain_params(params: dict) -> dict:
    """Asks for a tree like the parameters to lie as they do."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: constrain(x, *param_sharding(mesh, path_keys(path), x.shape).spec), params
    )


def gathered(weight, name: str, dtype):
    """A parameter, or one layer's slice of a stack, cast and then whole along `fsdp`: what a device computes
    with (ZeRO stage 3). Its gradient, in this dtype, comes back to where the parameter lies."""
    spec = param_spec(name, weight.shape)
    weight = constrain(weight.astype(dtype), *spec)  # or XLA would gather it first and cast it then
    return constrain(weight, *(None if axis == "fsdp" else axis for axis in spec))


def scattered(gradient, name: str):
    """A gradient, summed over batch shards, as its parameter lies; each device gets its part of the sum."""
    return constrain(gradient, *param_spec(name, gradient.shape))


def param_spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter lies on the mesh in use; without a mesh, whole."""
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec() if mesh.empty else param_sharding(mesh, (name,), shape).spec


def path_keys(path) -> tuple[str, ...]:
    """A JAX key path of nested dicts as strings."""
    return tuple(entry.key for entry in path)


def num_batch_shards(mesh) -> int:
    """Among how many shards the rows of a batch are divided; 1 for an empty mesh."""
    return math.prod(mesh.shape[axis] for axis in BATCH if axis in mesh.shape)


def local_rows(mesh, num_rows: int, multiple: int = 1) -> np.ndarray:
    """Which rows of a batch the devices of this process hold after `place_rows`: bool [num_rows]."""
    padded = num_rows + -num_rows % (multiple * num_batch_shards(mesh))
    here = np.zeros(padded, bool)
    for (rows,) in (
        NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((padded,)).values()
    ):
        here[rows] = True
    return here[:num_rows]


def place_rows(mesh, batch, multiple: int = 1):
    """Numpy arrays [rows, …] to arrays with rows spread over the batch axes; a process needs its
    `local_rows` alone to be right.

    Empty rows (zeros) are added until `multiple` times the number of shards divides their number.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    multiple *= num_batch_shards(mesh)

    def place(x):
        x = np.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)


def by_process(mesh, value) -> jax.Array:
    """An array with an entry a device, which is the `value` that the device's process gives."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.array([value]))
