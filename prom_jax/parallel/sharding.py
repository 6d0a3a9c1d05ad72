"""The mesh, the sharding of parameters and rows on it, and how arrays get there."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prom_jax.utils.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Rows of a batch are spread over both of these.
BATCH = ("data", "fsdp")
Axes = tuple[str | None, ...]


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


def param_sharding(mesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a parameter. An axis that the mesh does not divide stays whole on every device.

    Args:
      mesh: the mesh, or an abstract one.
      axes: the mesh axis of each of the last dimensions, or None; a leading layer axis is never split.
      shape: the global shape.
    """
    spec = [None] * (len(shape) - len(axes)) + list(axes)
    spec = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape)]
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x, *axes):
    """Asks for `x` to be split along mesh axes, dimension by dimension; without a mesh, nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def constrain_params(params: dict, axes: Mapping[str, Axes]) -> dict:
    """Asks for a tree like the parameters to be sharded as they are.

    Args:
      params: nested dict of arrays.
      axes: of each parameter by its name, as in `param_sharding`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def one(path, x):
        return constrain(x, *param_sharding(mesh, axes[path[-1].key], x.shape).spec)

    return jax.tree_util.tree_map_with_path(one, params)


def unshard_fsdp(weight, axes: Axes, dtype):
    """Casts a parameter, or one layer's slice of a stack, then all-gathers it along `fsdp` (ZeRO-3): what a
    device computes with. Its gradient, in this dtype, is sharded as the parameter is."""
    spec = param_spec(axes, weight.shape)
    weight = constrain(weight.astype(dtype), *spec)  # or XLA would gather it first and cast it then
    return constrain(weight, *(None if axis == "fsdp" else axis for axis in spec))


def reduce_scatter_grad(gradient, axes: Axes):
    """A gradient, summed over batch shards, sharded as its parameter is: each device gets its part of the
    sum."""
    return constrain(gradient, *param_spec(axes, gradient.shape))


def param_spec(axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter is sharded on the mesh in use; without a mesh, not at all."""
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec() if mesh.empty else param_sharding(mesh, axes, shape).spec


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
