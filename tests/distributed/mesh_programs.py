"""What the processes of a device mesh run in tests: a user's training script with replicas."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import layerpipe
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline

State = dict[str, Any]


def plain(stages: int = 4) -> list[nn.Module]:
    """Stages whose output for one sample depends on no other."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(stages - 1)]
    return [*parts, nn.Linear(6, 3)]


def dropping(stages: int = 4) -> list[nn.Module]:
    return [nn.Sequential(nn.Dropout(0.3), stage) for stage in plain(stages)]


MODELS = {"plain": plain, "chain": chain, "dropping": dropping}


def make(shape: tuple[int, int] | None, executor: str, model: str, options: State) -> layerpipe.Pipeline:
    mesh = None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp"))
    return pipeline(MODELS[model](), executor=executor, mesh=mesh, **options)


def feed(pipe: layerpipe.Pipeline, begin: int, end: int, losses: list[Any]) -> None:
    """Every replica its own half of each minibatch of 8; all of it where there is one."""
    for x, y in minibatches(end)[begin:]:
        loss = pipe.step(x.chunk(pipe.replicas)[pipe.replica], y.chunk(pipe.replicas)[pipe.replica])
        losses.append(None if loss is None else loss.item())


def train(rank: int, shape: tuple[int, int] | None, executor: str, model: str, options: State) -> State:
    with make(shape, executor, model, options) as pipe:
        losses: list[Any] = []
        feed(pipe, 0, 14, losses)
        losses.append([loss.item() for loss in pipe.drain()])
        feed(pipe, 14, 20, losses)
        losses.append([loss.item() for loss in pipe.drain()])
        return {
            "state": {name: value.clone() for name, value in pipe.state_dict().items()},
            "losses": losses,
            "latency": pipe.latency,
            "replica": pipe.replica,
            "own": list(pipe.ranks.own),
        }


def half(rank: int, shape: tuple[int, int] | None, executor: str, model: str, options: State, path: str) -> State:
    """Train, write a checkpoint, and go on."""
    with make(shape, executor, model, options) as pipe:
        feed(pipe, 0, 11, [])
        pipe.checkpoint(path, sharded=not path.endswith(".pt"))
        feed(pipe, 11, 20, [])
        pipe.drain()
        return pipe.state_dict()


def rest(rank: int, shape: tuple[int, int] | None, executor: str, model: str, options: State, path: str) -> State:
    """Go on from :func:`half`'s checkpoint in the middle."""
    with make(shape, executor, model, options) as pipe:
        pipe.resume(path)
        feed(pipe, 11, 20, [])
        pipe.drain()
        return pipe.state_dict()


def fails(rank: int, victim: int, how: str) -> None:
    """A process of one replica stops; all others are to end."""
    with make((2, 2), "serial", "plain", {}) as pipe:
        for i, (x, y) in enumerate(minibatches(200)):
            if i == 9 and rank == victim:
                if how == "dies":
                    import os

                    os._exit(1)
                raise ArithmeticError("on purpose")
            pipe.step(x, y)


def uneven(rank: int) -> None:
    with make((2, 1), "serial", "plain", {}) as pipe:
        for x, y in minibatches(6 + pipe.replica):
            pipe.step(x, y)
        pipe.drain()


def wrong(rank: int, what: str) -> str:
    size = dist.get_world_size()
    shapes: Any = {
        "names": ((2, 2), ("a", "b")),
        "executor": ((2, 2), ("dp", "pp")),
        "stages": ((1, size), ("dp", "pp")),
        "shape": ((4, 1) if rank == 3 else (2, 2), ("dp", "pp")),
    }
    shape, names = shapes[what]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    try:
        pipeline(plain(2), executor="streams" if what == "executor" else "serial", mesh=mesh).close()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "made"
