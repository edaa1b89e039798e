"""Small random programs, each trained by a pipeline and by :class:`DelayedTraining`.

    python -m tests.engine.random_programs --count 10000 --out counts.json

goes on where the file left off, with one thread.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.delayed_training import DelayedTraining
from tests.engine.random_layers import LAYERS, WIDTH

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


class Block(nn.Module):
    """Layers in a row, with what crosses a boundary besides."""

    def __init__(self, layers: list[nn.Module], *, first: str, sends: str) -> None:
        super().__init__()
        self.layers, self.first, self.sends = nn.ModuleList(layers), first, sends
        self.changes_inputs = first == "in place"
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor, *more: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.first == "in place":
            h = F.leaky_relu_(h, 0.3)
        for x in more:
            if x.dtype == torch.bool:
                h = h * (0.5 + x.float())
            elif not x.requires_grad:
                h = h + 0.1 * x.clamp_(-1, 1).mean()  # in place: it is data
            else:
                h = h + 0.3 * x.mean()
        for layer in self.layers:
            h = layer(h)
        h = h * self.gain
        if self.sends == "mask":
            return h, h > 0
        if self.sends == "data":
            return h, h.detach() * 2
        if self.sends == "two":
            return h, torch.tanh(h)
        if self.sends == "rows":
            return h, h[:, :3]
        return h


LOSSES: dict[str, Any] = {
    "cross entropy": lambda *o: F.cross_entropy(o[0][:, :3], o[-1]),
    "with a penalty": lambda *o: F.cross_entropy(o[0][:, :3], o[-1]) + 1e-2 * o[0].square().mean(),
    "of a norm": lambda *o: o[0].norm() / 10,
    "smooth": lambda *o: F.cross_entropy(o[0][:, :3], o[-1], label_smoothing=0.1),
    "in place": lambda *o: (o[0] + 1).mul_(0.5).square().mean(),
}


class Program:
    """What a number stands for."""

    def __init__(self, number: int) -> None:
        self.number = number
        choose = random.Random(number)
        count = choose.choice([2, 2, 3, 3, 3, 4])
        self.names = [[choose.choice(sorted(LAYERS)) for _ in range(choose.randint(1, 2))] for _ in range(count)]
        sends = ["mask", "data", "two", "rows", "", "", "", ""]
        self.sends = [choose.choice(sends) if s < count - 1 else "" for s in range(count)]
        # Not what the stage before keeps for its own backward, or sends twice: torch refuses one, layerpipe the other.
        may = [s > 0 and self.sends[s - 1] in ("", "data") for s in range(count)]
        self.first = ["in place" if may[s] and choose.random() < 0.25 else "" for s in range(count)]
        self.loss = choose.choice(sorted(LOSSES))
        self.schedule = choose.choice(["lockstep", "lockstep", "1f1b", "sequential"])
        self.past = choose.choice(["stash", "stash", "latest"])
        self.executor = choose.choice(["serial", "threads"])
        self.split = choose.random() < 0.25
        self.max_norm = choose.choice([None, None, 1.0])
        self.runs = [choose.randint(2, 7), *([choose.randint(1, 3)] if choose.random() < 0.3 else [])]
        self.modes = {choose.randint(1, 4): False, choose.randint(4, 6): True} if choose.random() < 0.25 else {}
        self.sizes = choose.choice([[5], [5], [5, 7, 3]])

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items())

    def stages(self) -> list[nn.Module]:
        torch.manual_seed(self.number)
        return [
            Block([LAYERS[name]() for name in names], first=first, sends=sends)
            for names, first, sends in zip(self.names, self.first, self.sends, strict=True)
        ]

    def data(self) -> list[list[tuple[Tensor, Tensor]]]:
        numbers = torch.Generator().manual_seed(self.number)
        sizes = [[self.sizes[i % len(self.sizes)] for i in range(count)] for count in self.runs]
        return [
            [(torch.randn(n, WIDTH, generator=numbers), torch.randint(3, (n,), generator=numbers)) for n in run]
            for run in sizes
        ]


def difference(program: Program) -> str:
    """What a pipeline does otherwise than the simulation; nothing if all losses, weights and buffers agree in all
    bits."""
    theirs, ours = program.stages(), program.stages()
    options: dict[str, Any] = {"schedule": program.schedule, "past": program.past, "max_norm": program.max_norm}
    torch.manual_seed(1)
    data = program.data()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*works on copies of")
        with layerpipe.Pipeline(
            ours,
            LOSSES[program.loss],
            lambda params, **past: lk.SGD(params, **SGD, **past),
            executor=program.executor,
            split_backward=program.split,
            threads_per_stage=1,
            **options,
        ) as pipe:
            states = [stage.random.generator.get_state() for stage in pipe.stages if stage.random is not None]
            simulated = DelayedTraining(
                theirs, LOSSES[program.loss], lambda params: torch.optim.SGD(params, foreach=False, **SGD),
                random=states, **options,
            )  # fmt: skip
            switches = {at: functools.partial(_switch, theirs, mode) for at, mode in program.modes.items()}
            for run in data:
                losses = []
                for i, (x, y) in enumerate(copy.deepcopy(run)):
                    if i in program.modes:
                        pipe.train(program.modes[i])
                    if (loss := pipe.step(x, y)) is not None:
                        losses.append(loss)
                losses += pipe.drain()
                expected = simulated.train(run, {at: switch for at, switch in switches.items() if at < len(run)})
                for i, (loss, other) in enumerate(zip(losses, expected, strict=True)):
                    if not torch.equal(loss, other):
                        return f"loss {i}: {loss.item()} instead of {other.item()}"
    for s, (mine, other_stage) in enumerate(zip(ours, theirs, strict=True)):
        state = mine.state_dict()
        for name, value in other_stage.state_dict().items():
            if not torch.equal(state[name], value):
                return f"stage {s}: {name} by {(state[name] - value).abs().max()}"
    return ""


def _switch(stages: list[nn.Module], mode: bool) -> None:
    for stage in stages:
        stage.train(mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, Any] = {"run": 0, "differences": {}, "next": options.first}
    if options.out.exists():
        done = json.loads(options.out.read_text())
    written = time.time()
    while done["run"] < options.count:
        program = Program(done["next"])
        try:
            found = difference(program)
        except Exception as error:
            found = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
        if found:
            done["differences"][str(program)] = found
            print(program, found, sep="\n", flush=True)
        done["run"], done["next"] = done["run"] + 1, done["next"] + 1
        if time.time() - written > 5 or done["run"] >= options.count:
            options.out.with_suffix(".new").write_text(json.dumps(done))
            options.out.with_suffix(".new").replace(options.out)
            written = time.time()


if __name__ == "__main__":
    main()
