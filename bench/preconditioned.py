"""Steps of SOAP and Muon beside public implementations of them, and what they take of a training step.

    python -m bench.preconditioned                       # whole lists of parameters, one step after the other
    python -m bench.preconditioned --share               # forward, backward and step of small networks

Rounds interleave the implementations, ratios are formed within a round, and the table has their medians. A round is one
``precondition_frequency`` of steps, so that refreshes count. Times are the processor's (of all threads of this
process), which say more than the wall's on a machine with other work. Convolutions are given to all as ``(out, in * k *
k)``, and everyone turns the sides of up to ``--max-precond-dim``: the same algorithm on the same matrices.

``pytorch_optimizer`` takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import layerpipe_kernels as lk
from bench import environment
from bench.others import Others
from bench.parameter_lists import NETWORKS, Shape, gpt
from bench.report import console, save
from layerpipe.models import resnet18
from layerpipe.models.gpt import GPT

PERIOD = 10

Make = Callable[[list[Tensor]], list[torch.optim.Optimizer]]


def flat(shapes: list[Shape]) -> list[Shape]:
    """Convolutions as matrices."""
    return [(s[0], s[1] * s[2] * s[3]) if len(s) == 4 else s for s in shapes]


LISTS = {
    "resnet18": flat(NETWORKS["resnet18"]),
    "gpt2, 2 layers": gpt(2, 768, vocabulary=0),
    "gpt 256": gpt(4, 256, vocabulary=256, context=128),
}


def _is_matrix(param: Tensor) -> bool:
    return param.ndim == 2


def soaps(dim: int) -> dict[str, Make]:
    """Implementations of SOAP, ours first."""
    made: dict[str, Make] = {
        "layerpipe": lambda params: [lk.SOAP(params, max_precond_dim=dim, precondition=True, one_sided=False)],
        "layerpipe, bf16 state": lambda params: [
            lk.SOAP(params, max_precond_dim=dim, precondition=True, one_sided=False, state_dtype=torch.bfloat16)
        ],
        "layerpipe, one side": lambda params: [lk.SOAP(params, max_precond_dim=dim, precondition=True, one_sided=True)],
    }
    try:
        other = importlib.import_module("pytorch_optimizer").SOAP
    except ImportError:
        return made
    return {**made, "pytorch_optimizer": lambda params: [other(params, max_precondition_dim=dim)]}


def muons() -> dict[str, Make]:
    """Implementations of Muon, ours first; torch's with its fused AdamW for what is no matrix."""

    def torchs(params: list[Tensor]) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Muon([p for p in params if _is_matrix(p)]),
            torch.optim.AdamW([p for p in params if not _is_matrix(p)], fused=True),
        ]

    return {"layerpipe": lambda params: [lk.Muon(params, precondition=True)], "torch": torchs}


def processor_seconds(call: Callable[[], None]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def steps(optimizers: list[torch.optim.Optimizer], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            for optimizer in optimizers:
                optimizer.step()

    return run


def compare(shapes: list[Shape], makers: dict[str, Make], rounds: int) -> dict[str, dict[str, float]]:
    """Per implementation: seconds of a step, and how many times those of the first one it takes."""
    runs = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        params = [torch.randn(shape, requires_grad=True) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        runs[name] = steps(make(params), PERIOD)
        runs[name]()  # the first steps begin the preconditioners
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(processor_seconds(run) / PERIOD)
    first = next(iter(times.values()))
    return {
        name: {
            "seconds": statistics.median(mine),
            "times_ours": statistics.median(a / b for a, b in zip(mine, first, strict=True)),
        }
        for name, mine in times.items()
    }


def networks() -> dict[str, tuple[torch.nn.Module, Callable[[torch.nn.Module], Tensor]]]:
    """Small networks, and a loss of a minibatch of each."""
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    tokens, following = torch.randint(256, (2, 16, 128))
    return {
        "ResNet-18 of width 16, batch 64": (
            resnet18(width=16, channels=1),
            lambda model: F.cross_entropy(model(images), labels),
        ),
        "GPT of width 256, batch 16": (
            GPT(layers=4, width=256, heads=4, context=128, vocabulary=256),
            lambda model: F.cross_entropy(model(tokens).flatten(0, 1), following.flatten()),
        ),
    }


SHARES: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "AdamW": lk.AdamW,
    "SOAP": lk.SOAP,
    "SOAP, bf16 state": lambda params: lk.SOAP(params, state_dtype=torch.bfloat16),
    "SOAP, both sides": lambda params: lk.SOAP(params, one_sided=False),
    "Muon": lk.Muon,
}


def shares(rounds: int) -> list[dict[str, Any]]:
    """Per network and optimizer: its part of forward, backward and step."""
    rows = []
    for network, (model, loss) in networks().items():
        lk.mark_embeddings_and_output(model)
        loss(model).backward()
        runs = {name: steps([make(list(model.parameters()))], PERIOD) for name, make in SHARES.items()}
        for run in runs.values():
            run()
        found: dict[str, list[float]] = {name: [] for name in runs}

        def layers(model: torch.nn.Module = model, loss: Callable[[torch.nn.Module], Tensor] = loss) -> None:
            model.zero_grad()
            loss(model).backward()

        for _ in range(rounds):
            rest = processor_seconds(layers)
            for name, run in runs.items():
                step = processor_seconds(run) / PERIOD
                found[name].append(step / (step + rest))
        rows += [{"network": network, "optimizer": n, "share": statistics.median(f)} for n, f in found.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.preconditioned", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", action="store_true", help="measure the step's part of a training step")
    parser.add_argument("--lists", default=";".join(LISTS), help="of: " + "; ".join(LISTS))
    parser.add_argument("--max-precond-dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the measurements")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = console(110)
    rows: list[dict[str, Any]] = []
    with Others() as others:
        if args.share:
            rows = shares(args.rounds)
            table = Table("network", "optimizer", "of forward, backward and step")
            for row in rows:
                table.add_row(row["network"], row["optimizer"], f"{100 * row['share']:.1f} %")
        else:
            table = Table("parameters", "optimizer", "implementation", "ms", "times ours")
            for name in args.lists.split(";"):
                for kind, makers in (("SOAP", soaps(args.max_precond_dim)), ("Muon", muons())):
                    for who, found in compare(LISTS[name.strip()], makers, args.rounds).items():
                        rows.append({"list": name.strip(), "optimizer": kind, "implementation": who, **found})
                        times = f"{found['times_ours']:.2f}"
                        table.add_row(name.strip(), kind, who, f"{1e3 * found['seconds']:.1f}", times)
    described = environment.describe()
    out.print(table)
    out.print(f"{described['processor']}, torch {described['torch']}, {args.threads} threads, {described['date']}")
    out.print(str(others))
    save(args.json, rows=rows)


if __name__ == "__main__":
    main()
