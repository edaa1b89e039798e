"""The places of processes in a device mesh: a device mesh's replicas (``"dp"``) by processes of a pipeline
(``"pp"``)."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist

from layerpipe.executors.notices import Notices
from layerpipe.executors.ranks import Ranks, holder

#: What the dimensions of a mesh are called.
DIMENSIONS = ("dp", "pp")
#: How a process may run its stages while others hold the rest.
EXECUTORS = ("serial", "threads", "distributed")


def make(executor: str, mesh: Any, stages: int) -> Ranks:
    """The processes of a pipeline: one, those of a mesh, or for ``"distributed"`` without one all of torch's default
    group, each of which holds other stages.

    Args:
        mesh: a :class:`torch.distributed.device_mesh.DeviceMesh` of all processes with the dimensions ``"dp"``,
            ``"pp"`` or both; ``None`` for none.

    Raises:
        RuntimeError: there is no default group.
        ValueError: fewer stages than processes, another executor than those above, or another mesh.
    """
    if mesh is None and executor != "distributed":
        return Ranks(stages)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "executor='distributed' and mesh= have a process for each stage: start them with torchrun, and call "
            "torch.distributed.init_process_group() in each before the pipeline is made"
        )
    size = dist.get_world_size()
    grid = torch.arange(size).view(1, size) if mesh is None else _grid(mesh, executor, size)
    replicas, processes = grid.shape
    # Before a group is made: one that connects while another process is already leaving it fails in gloo's words.
    if stages < processes:
        raise ValueError(f"{processes} processes need at least as many stages, got {stages}")
    # Groups live as long as the default one: when close() returns, another process may still have to take the last
    # message, and a receive for which none will come cannot be called off.
    everyone = _group(list(range(size)))
    if replicas == 1:
        return Ranks(stages, everyone)
    shapes: list[Any] = [None] * size
    dist.all_gather_object(shapes, grid.tolist(), group=everyone)
    for rank, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"mesh is {shape} in process {rank} and {shapes[0]} in process 0")
    replica, rank = (grid == dist.get_rank()).nonzero()[0].tolist()
    rows = [_group(row) for row in grid.tolist()]
    # A group per stage: stages in threads of their own average their gradients in no common order.
    holders = [holder(stage, stages, processes) for stage in range(stages)]
    averaging = [_group(grid[:, column].tolist()) for column in holders]
    own = [group for group, column in zip(averaging, holders, strict=True) if column == rank]
    return Ranks(
        stages,
        rows[replica],
        everyone=everyone,
        replica=replica,
        replicas=replicas,
        averaging=own,
        notices=Notices(everyone, _timeout(dist.group.WORLD), replica, replicas),
    )


def _grid(mesh: Any, executor: str, size: int) -> torch.Tensor:
    """The processes' ranks ``(replicas, processes of each)``."""
    names = mesh.mesh_dim_names or ()
    if not names or any(name not in DIMENSIONS for name in names):
        raise ValueError(
            f"mesh has the dimensions {names}; name them 'dp' (replicas) and 'pp' (pipeline): "
            "init_device_mesh('cpu', (2, 2), mesh_dim_names=('dp', 'pp'))"
        )
    if executor not in EXECUTORS or mesh.device_type != "cpu":
        raise ValueError(
            f"executor={executor!r} on a mesh of {mesh.device_type!r}: processes exchange tensors of the CPU, and run "
            f"their stages with one of {', '.join(EXECUTORS)}; for the GPUs of one machine there is devices="
        )
    ranks: torch.Tensor = mesh.mesh.cpu()
    if names == ("pp", "dp"):
        ranks = ranks.t()
    grid = ranks.reshape(-1, ranks.shape[-1] if "pp" in names else 1)
    if sorted(grid.flatten().tolist()) != list(range(size)):
        raise ValueError(f"mesh has the processes {grid.flatten().tolist()}, the default group has {size}; use all")
    if bool((grid.diff(dim=0) <= 0).any()) or bool((grid.diff(dim=1) <= 0).any()):
        raise ValueError(f"mesh must have its ranks in increasing order along both dimensions, got {grid.tolist()}")
    return grid


def _group(ranks: list[int]) -> Any:
    return dist.new_group(ranks, backend="gloo", timeout=_timeout(dist.group.WORLD))


def _timeout(group: Any) -> datetime.timedelta:
    """Return the timeout that :func:`torch.distributed.init_process_group` was given; new groups have torch's default
    otherwise."""
    try:
        timeout: datetime.timedelta = group._get_backend(group._device_types[0]).options._timeout
    except AttributeError:  # a torch that has renamed it
        from torch.distributed.constants import default_pg_timeout  # not every torch has it

        return default_pg_timeout
    return timeout
