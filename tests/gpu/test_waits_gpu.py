"""Streams and graphs whose work takes milliseconds at random places: what does not wait for it computes something else.

Short stages finish before the host has launched the next, so that a wait which is missing goes unnoticed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MILLISECOND = 1_500_000  # cycles, about
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Site = tuple[str, int]  # the function and line that asked for something


class Slow(nn.Module):
    """Layers between delays of the device, in forward and backward, on whichever streams these are."""

    def __init__(self, layers: nn.Module, seed: int) -> None:
        super().__init__()
        self.layers, self.random = layers, random.Random(seed)

    def forward(self, x: Tensor) -> Tensor:
        self._sleep()
        y: Tensor = self.layers(x)
        if y.requires_grad:
            y.register_hook(lambda _: self._sleep())
        return y

    def _sleep(self) -> None:
        if DEVICE == "cuda":
            torch.cuda._sleep(MILLISECOND * self.random.choice((0, 1, 4)))


class Pooled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1))


def stages(kind: str) -> list[nn.Module]:
    torch.manual_seed(1)
    made: list[nn.Module]
    if kind == "convolution":
        made = [
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        ]
    else:
        made = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)]
    made = [Slow(stage, seed) for seed, stage in enumerate([*made, Pooled(8, 3)])]
    if kind == "convolution":
        made = [stage.to(memory_format=torch.channels_last) for stage in made]
    return made


def data(kind: str, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        x = torch.randn((16, 8, 6, 6) if kind == "convolution" else (16, 5, 8), generator=generator)
        y = torch.randint(0, 3, (16,), generator=generator)
        made.append((x.to(memory_format=torch.channels_last) if kind == "convolution" else x, y))
    return made


def loss_fn(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.float(), target)


def train(
    kind: str, executor: str, ticks: int, *, dtype: torch.dtype = torch.float32, compiled: bool = False, **options: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and weights. The minibatches are made for each step, and forgotten while it may still be under way."""
    parts = [stage.to(DEVICE, dtype) for stage in stages(kind)]
    if compiled:
        parts[1] = torch.compile(parts[1])  # type: ignore[assignment]

    def optimizer(params: list[Tensor], **past: Any) -> Any:
        lr = torch.tensor(0.05, device=DEVICE) if DEVICE == "cuda" else 0.05
        capturable = DEVICE == "cuda"
        return lk.SGD(params, lr=lr, momentum=0.9, capturable=capturable, master_weights=dtype != torch.float32, **past)

    with layerpipe.Pipeline(parts, loss_fn, optimizer, executor=executor, schedule="lockstep", **options) as pipe:
        losses = []
        for x, y in data(kind, ticks):
            loss = pipe.step(x.to(DEVICE, dtype, non_blocking=True), y.to(DEVICE, non_blocking=True))
            losses += [loss * 1] if loss is not None else []
        losses += [loss * 1 for loss in pipe.drain()]
        state = {name: value.cpu().clone() for name, value in pipe.state_dict().items() if isinstance(value, Tensor)}
    return [loss.cpu() for loss in losses], state


CASES: dict[str, dict[str, Any]] = {
    "convolution": {"kind": "convolution"},
    "attention": {"kind": "attention"},
    "bfloat16": {"kind": "convolution", "dtype": torch.bfloat16},
    "split": {"kind": "attention", "split_backward": True},
    "clipped": {"kind": "attention", "max_norm": 0.5},
    "stash": {"kind": "convolution", "past": "stash"},
    "materialized": {"kind": "attention", "past": lk.Blend(materialize=True)},
    "compiled": {"kind": "attention", "compiled": True},
}


@pytest.mark.parametrize("executor", ["streams", "graphs"])
@pytest.mark.parametrize("case", CASES)
def test_slow_work_changes_no_bit(case: str, executor: str) -> None:
    want, weights = train(executor="serial", ticks=30, **CASES[case])
    got, state = train(executor=executor, ticks=30, **CASES[case])
    assert all(map(torch.equal, want, got))
    assert [name for name in weights if not torch.equal(weights[name], state[name])] == []


def waiting(monkeypatch: pytest.MonkeyPatch, without: Site | None) -> set[Site]:
    """The engine's lines that have a stream wait, as they come; one of them is left out."""
    seen: set[Site] = set()
    waits: Callable[..., None] = torch.cuda.Stream.wait_event

    def wait_event(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and "/layerpipe/" not in frame.f_code.co_filename:
            frame = frame.f_back
        site = (frame.f_code.co_name, frame.f_lineno) if frame is not None else ("", 0)
        seen.add(site)
        if site != without:
            waits(stream, event)

    monkeypatch.setattr(torch.cuda.Stream, "wait_event", wait_event)
    return seen


def test_every_wait_is_needed() -> None:
    """Without it other numbers come out, in one of the cases at least."""
    cases = ("convolution", "split", "clipped")
    want = {case: train(executor="serial", ticks=16, **CASES[case]) for case in cases}

    def differs(case: str, without: Site | None) -> tuple[bool, set[Site]]:
        with pytest.MonkeyPatch.context() as patch:
            seen = waiting(patch, without)
            losses, state = train(executor="streams", ticks=16, **CASES[case])
        same = all(map(torch.equal, losses, want[case][0]))
        return not same or any(not torch.equal(state[name], want[case][1][name]) for name in state), seen

    sites: set[Site] = set()
    for case in cases:
        different, seen = differs(case, None)
        assert not different
        sites |= seen
    assert len(sites) >= 6
    unneeded = [site for site in sorted(sites) if not any(differs(case, site)[0] for case in cases)]
    assert not unneeded
