"""Checks of what a pipeline is made of and fed, before anything is built of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def check_made_of(stages: Sequence[nn.Module], loss_fn: Any, optimizer: Any, max_norm: float | None) -> None:
    """Check the arguments of :class:`layerpipe.Pipeline`.

    Raises:
        TypeError: stages that are one module or not modules, a loss or an optimizer that is no function.
        ValueError: no stages, or a norm that is not more than 0.
    """
    if isinstance(stages, nn.Module) and not isinstance(stages, (nn.Sequential, nn.ModuleList)):
        raise TypeError(f"stages is a {type(stages).__name__}; cut it with layerpipe.split, or give a list of modules")
    for name, function in (("loss_fn", loss_fn), ("optimizer", optimizer)):
        if not callable(function):
            how = "function that makes one: lambda params, **past: layerpipe_kernels.SGD(params, lr=..., **past)"
            wanted = "function of output and target" if name == "loss_fn" else how
            raise TypeError(f"{name} is a {type(function).__name__}, not a {wanted}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be more than 0, got {max_norm}")
    if not stages:
        raise ValueError("a pipeline needs at least one stage")
    for i, module in enumerate(stages):
        if not isinstance(module, nn.Module):
            raise TypeError(f"stage {i} is a {type(module).__name__}, not an nn.Module")


def check_accumulate(accumulate: int, executor: str) -> None:
    """Check the number of minibatches per update.

    Raises:
        TypeError: not a whole number.
        ValueError: less than 1, or more where graphs are captured.
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int):
        raise TypeError(f"accumulate is a whole number of minibatches per update, got {accumulate!r}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 minibatch per update, got {accumulate}")
    if accumulate > 1 and executor == "graphs":
        raise ValueError(
            f"executor='graphs' replays the same work for every minibatch and cannot make one update in {accumulate} "
            "of them; use executor='streams', or accumulate=1"
        )


def check_max_norm_of(max_norm_of: str, max_norm: float | None, executor: str) -> None:
    """Of what ``max_norm`` clips the norm.

    Raises:
        ValueError: an unknown name, no ``max_norm``, or the network's where devices' streams run the stages.
    """
    if max_norm_of not in ("stage", "network"):
        raise ValueError(f"max_norm_of={max_norm_of!r} is unknown; there are: stage, network")
    if max_norm_of == "network" and max_norm is None:
        raise ValueError("max_norm_of='network' says what max_norm= is of; give max_norm, too")
    if max_norm_of == "network" and executor in ("streams", "graphs"):
        raise ValueError(f"max_norm_of='network' is not for executor={executor!r}, which clips each stage's norm")


def checked_path(path: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """The path of a directory, which every process gives.

    Raises:
        ValueError: there is none.
    """
    if path is None:
        raise ValueError("a sharded checkpoint needs its path in every process")
    return path


def check_fed(inputs: tuple[Any, ...]) -> None:
    """Check what a tick is given, and torch's modes.

    Raises:
        RuntimeError: inside ``torch.no_grad()`` or ``torch.autocast``, which reach no other thread.
        ValueError: the inputs require gradients.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("pipe.step() trains; call it outside torch.no_grad()")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError("autocast does not reach the stages' threads; enter it inside a stage's forward")
    if any(x.requires_grad if isinstance(x, Tensor) else _requires_grad(x) for x in inputs):
        raise ValueError("the pipeline computes no gradient of its inputs; pass inputs.detach()")


def check_loss(loss: Any) -> None:
    """Check what a loss has returned.

    Raises:
        TypeError: something else than a tensor of real numbers.
        ValueError: more or fewer than one number.
    """
    hint = "return the loss alone, and keep metrics beside it"
    if isinstance(loss, int | float):
        hint = "a number has no gradient; leave out .item()"
    if loss is None:
        hint = "it has no return"
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return one number as a tensor, got a {type(loss).__name__}: {hint}")
    if loss.numel() != 1:
        shape = tuple(loss.shape)
        raise ValueError(f"loss_fn must return one number, got a tensor of shape {shape}: take its mean() or sum()")
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn must return one real number, got a tensor of {loss.dtype}")


def _requires_grad(structure: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(structure))
