"""How near reconstructed past weights come to the true ones, in real training.

    python -m bench.past_weights
    python -m bench.past_weights --spike-compensation 1 --weight-prediction 1

A small network trains undelayed. Beside it, one optimizer per kind of past weights steps a copy of its weights with
the same gradients, so that all of them see one and the same sequence of weights; the true versions are kept. With a
knob, it trains with delayed gradients, once per delay, each taken at the true weights of so many updates ago: what the
knobs are for.

*Error* is the relative mean-square error: the squared distance of the past weights from the true ones, over that of
the latest weights from the true ones, both over all elements; 1.0 is what using the latest weights gives. The tables
show its mean over readings in the run's second to last tenth, and the worst reading.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import statistics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe_kernels as lk
from bench import environment
from bench.report import save
from layerpipe import data

DELAYS = (2, 6, 14)
CONTEXT, VOCABULARY = 64, 128

#: Optimizer, peak learning rate for the convolutional network and for the transformer, options.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], float, float, dict[str, Any]]] = {
    "SGD, momentum .9": (lk.SGD, 0.05, 0.1, {"momentum": 0.9, "weight_decay": 5e-4}),
    "SGD, Nesterov .9": (lk.SGD, 0.05, 0.1, {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
    "AdamW": (lk.AdamW, 2e-3, 2e-3, {"weight_decay": 0.01}),
    "Lamb": (lk.Lamb, 1e-2, 1e-2, {"weight_decay": 0.01}),
}
KINDS: dict[str, dict[str, Any]] = {
    "ema matched": {"past": "ema"},
    "blend 1": {"past": lk.Blend(order=1)},
    "blend 2": {"past": lk.Blend(order=2)},
    "blend 3": {"past": lk.Blend(order=3)},
    "coupled 2": {"past": lk.Blend(order=2, decay="coupled")},
    "coupled 3": {"past": lk.Blend(order=3, decay="coupled")},
    "blend 2, bf16": {"past": lk.Blend(order=2, dtype=torch.bfloat16)},
    "blend 3, bf16": {"past": lk.Blend(order=3, dtype=torch.bfloat16)},
    "coupled 2, bf16": {"past": lk.Blend(order=2, decay="coupled", dtype=torch.bfloat16)},
    "coupled 3, bf16": {"past": lk.Blend(order=3, decay="coupled", dtype=torch.bfloat16)},
    "coupled 2, materialized": {"past": lk.Blend(order=2, decay="coupled", materialize=True)},
    "momentum": {"past": "momentum"},
}

Loss = Callable[[], Tensor]


def cnn(batch: int, root: Path) -> tuple[nn.Module, Iterator[Loss], str]:
    """Three convolutions with batch normalisation on Fashion-MNIST, or on scikit-learn's digits if it is not here."""
    name = "fashion-mnist" if data.DEBIAN_FASHION_MNIST.is_dir() else "digits"
    images = data.load(name, root)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, images.classes),
    )  # fmt: skip

    def losses() -> Iterator[Loss]:
        for x, y in images.batches(batch, seed=0):
            yield lambda x=x, y=y: F.cross_entropy(model(x), y)

    return model, losses(), images.name


class CharacterModel(nn.Module):
    """A decoder of two pre-normalised layers over ASCII."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:  # (B, T) int64 -> (B, T, VOCABULARY)
        made: Tensor = self.token(x) + self.position.weight
        return self.head(self.layers(made, mask=self.mask, is_causal=True))  # type: ignore[no-any-return]


def transformer(batch: int, root: Path) -> tuple[nn.Module, Iterator[Loss], str]:
    """The next character of the Python standard library's own sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    codes = codes[codes < VOCABULARY]
    model, generator = CharacterModel(), torch.Generator().manual_seed(0)

    def losses() -> Iterator[Loss]:
        while True:
            starts = torch.randint(len(codes) - CONTEXT - 1, (batch, 1), generator=generator)
            chosen = codes[starts + torch.arange(CONTEXT + 1)]
            yield lambda c=chosen: F.cross_entropy(model(c[:, :-1]).flatten(0, 1), c[:, 1:].flatten())

    return model, losses(), "Python's standard library"


NETWORKS = {"CNN": cnn, "transformer": transformer}


class Shadow:
    """An optimizer on a copy of the weights, stepped with the leader's gradients."""

    def __init__(self, make: Callable[..., Any], leader: Sequence[Tensor], delay: int, options: dict[str, Any]) -> None:
        self.delay = delay
        self.params = [p.detach().clone().requires_grad_() for p in leader]
        self.optimizer = make(self.params, delay=delay, **options)
        self.errors: list[float] = []

    def step(self, leader: list[Tensor], lr: float) -> None:
        for param, lead in zip(self.params, leader, strict=True):
            param.grad = lead.grad
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def read(self, versions: collections.deque[list[Tensor]]) -> None:
        true, latest = versions[-1 - self.delay], versions[-1]
        past = [self.optimizer.past_weight(p) for p in self.params]
        self.errors.append(distance(past, true) / distance(latest, true))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))


def rate(step: int, steps: int, peak: float) -> float:
    """A warm-up over a tenth of the run, then a cosine down to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * float(1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (steps - warm))))


@contextlib.contextmanager
def at(params: Sequence[Tensor], version: Sequence[Tensor]) -> Iterator[None]:
    """Parameters as they were in another version, for as long as a gradient is computed."""
    now = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, version)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, now)


def train(
    network: str,
    optimizer: str,
    delays: Sequence[int],
    gradients_late: int,
    knobs: dict[str, float],
    steps: int,
    batch: int,
    root: Path,
) -> tuple[dict[str, Any], dict[tuple[str, int], Shadow]]:
    """One run, and its shadows by kind and delay."""
    torch.manual_seed(0)
    model, losses, source = NETWORKS[network](batch, root)
    make, *peaks, options = OPTIMIZERS[optimizer]
    options = {**options, **knobs}
    peak = peaks[list(NETWORKS).index(network)]
    leader = list(model.parameters())
    lead = make(leader, lr=peak, **options)
    kinds = [kind for kind in KINDS if kind != "momentum" or (make is lk.SGD and not knobs)]
    shadows = {
        (kind, delay): Shadow(make, leader, delay, {"lr": peak, **options, **KINDS[kind]})
        for kind in kinds
        for delay in delays
    }
    if knobs:
        lead.set_staleness(gradients_late)
    versions: collections.deque[list[Tensor]] = collections.deque(maxlen=max(DELAYS) + 1)
    versions.append([p.detach().clone() for p in leader])
    readings, trained = range(steps // 10, steps - steps // 10), []
    for step in range(steps):
        lead.zero_grad()
        with at(leader, versions[max(-1 - gradients_late, -len(versions))]):
            loss = next(losses)()
            loss.backward()
        trained.append(loss.item())
        if not math.isfinite(trained[-1]):
            raise RuntimeError(f"{network}, {optimizer}, {gradients_late} updates late: diverged after {step} steps")
        lr = rate(step, steps, peak)
        for group in lead.param_groups:
            group["lr"] = lr
        for shadow in shadows.values():
            shadow.step(leader, lr)
        lead.step()
        versions.append([p.detach().clone() for p in leader])
        if step in readings and step % 10 == 0 and len(versions) > max(DELAYS):
            for shadow in shadows.values():
                if not all(map(torch.equal, shadow.params, versions[-1])):
                    raise RuntimeError("an optimizer with a past does not step as the one without")
                shadow.read(versions)
    run = {
        "network": network,
        "data": source,
        "parameters": sum(p.numel() for p in leader),
        "optimizer": optimizer,
        "steps": steps,
        "batch": batch,
        "peak_lr": peak,
        "loss": [trained[0], statistics.mean(trained[-steps // 10 :])],
        **knobs,
    }
    return run, shadows


def measure(
    network: str, optimizer: str, knobs: dict[str, float], steps: int, batch: int, root: Path
) -> dict[str, Any]:
    """One undelayed run for all delays, or with a knob one run of late gradients for each."""
    runs = [((delay,), delay) for delay in DELAYS] if knobs else [(DELAYS, 0)]
    found = [train(network, optimizer, *run, knobs, steps, batch, root) for run in runs]
    shadows = {key: shadow for _, made in found for key, shadow in made.items()}
    return {
        **found[0][0],
        "losses": [run["loss"] for run, _ in found],
        "errors": [
            {"kind": kind, "delay": delay, "mean": statistics.mean(s.errors), "worst": max(s.errors)}
            for (kind, delay), s in shadows.items()
        ],
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """One row per optimizer and delay, one column per kind: mean error (worst reading)."""
    lines = []
    for network in dict.fromkeys(r["network"] for r in results):
        chosen = [r for r in results if r["network"] == network]
        first = chosen[0]
        size = f"{first['parameters']:,} parameters"
        lines += [
            f"{network}, {size}, {first['data']}, {first['steps']} steps of {first['batch']}:",
            "",
            f"| optimizer | n | {' | '.join(KINDS)} |",
            "| --- " * (2 + len(KINDS)) + "|",
        ]
        for result in chosen:
            for delay in DELAYS:
                found = {e["kind"]: e for e in result["errors"] if e["delay"] == delay}
                cells = [f"{found[k]['mean']:.2g} ({found[k]['worst']:.2g})" if k in found else "–" for k in KINDS]
                lines.append(f"| {result['optimizer']} | {delay} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data", type=Path, default=Path("data"), help="where downloaded data sets lie")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--spike-compensation", type=float, default=0.0)
    parser.add_argument("--weight-prediction", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    args = parser.parse_args()
    if args.steps < 10 * (max(DELAYS) + 1):
        parser.error(f"--steps: at least {10 * (max(DELAYS) + 1)}, so that every delay has filled before the readings")
    knobs = {"spike_compensation": args.spike_compensation, "weight_prediction": args.weight_prediction}
    knobs = {knob: value for knob, value in knobs.items() if value}
    results = []
    for network in args.network:
        for optimizer in args.optimizer:
            results.append(measure(network, optimizer, knobs, args.steps, args.batch, args.data))
            losses = ", ".join(f"{first:.2f} -> {last:.2f}" for first, last in results[-1]["losses"])
            print(f"{network}, {optimizer}: loss {losses}", flush=True)
    described = environment.describe()
    print("\n" + markdown(results))
    print(f"{described['command']}; {described['processor']}, torch {described['torch']}, {described['date']}")
    save(args.json, results=results)


if __name__ == "__main__":
    main()
