"""A one-axis mesh of all devices, and the shardings of arrays on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxii.errors import InputError

DATA_AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of `devices` (default: all) along the axis "data"."""
    chosen = np.array(devices if devices is not None else jax.devices())
    # jax.make_mesh would make Explicit axes, whose types spread through the model.
    return Mesh(chosen, (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def divided(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays divided over the mesh along their first axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(
    global_batch_size: int, num_devices: int, micro_batches: int = 1
) -> None:
    """Checks that a batch divides over devices and micro-batches.

    Raises:
      InputError: If the batch does not divide; names the nearest sizes that do.
    """
    unit = num_devices * micro_batches
    if global_batch_size > 0 and global_batch_size % unit == 0:
        return
    below = global_batch_size // unit * unit
    nearest = f"{below} or {below + unit}" if below > 0 else str(unit)
    pieces = f"{num_devices} devices"
    if micro_batches > 1:
        pieces += f" x {micro_batches} micro-batches"
    raise InputError(
        f"global_batch_size={global_batch_size} is not divisible by {pieces}; "
        f"use {nearest}."
    )


def check_group(group: int | None, num_devices: int) -> None:
    """Checks that the size of BatchNorm's groups divides the number of devices.

    Raises:
      InputError: If the size does not divide it; names the nearest sizes that do.
    """
    if group is None or num_devices % group == 0:
        return
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    nearest = [n for n in sizes if n < group][-1:] + [n for n in sizes if n > group][:1]
    raise InputError(
        f"config.model.batch_norm=group:{group} does not divide {num_devices} devices; "
        f"use {' or '.join(f'group:{n}' for n in nearest)}."
    )


def to_devices(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Sends this process's share of a batch to its devices, without waiting.

    Args:
      batch: Arrays [process_batch_size, ...].
      sharding: Sharding of the global batch.

    Returns:
      Global arrays [global_batch_size, ...].
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
