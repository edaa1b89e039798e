"""A small GPT learns Python from the sources of Python's own library, as a pipeline of two threads.

    python examples/gpt.py                      # a few minutes on two cores
    python examples/gpt.py --accumulate 2       # minibatches in two parts: half the delay
    python examples/gpt.py --past stash         # the same with weights that are stored, not reconstructed
    python examples/gpt.py --stages 1           # ordinary training: one stage is bit for bit a plain loop
    python examples/gpt.py --optimizer adamw    # what a delay costs without a preconditioner

Delayed gradients slow a transformer down, with stored weights as much as with reconstructed ones. SOAP bears them best,
with an average of gradients that is the longer the later they are, spike compensation and weight prediction;
docs/delay.md has numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import layerpipe
import layerpipe_kernels as lk
from layerpipe import data
from layerpipe.models.gpt import GPT

CONTEXT, BATCH = 128, 16


sources = data.python_sources


def minibatch(text: Tensor, generator: torch.Generator, size: int = BATCH) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - CONTEXT, (size,), generator=generator)
    windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def nadam(params: list[Tensor], **past: Any) -> lk.PastWeights:
    """Any optimizer of torch's can have a past; this one's momentum looks ahead."""
    options: Any = {"betas": (0.99, 0.95), "weight_decay": 0.1, "decoupled_weight_decay": True}
    return lk.PastWeights(torch.optim.NAdam(params, lr=6e-4, **options), **past)


def adamw(params: list[Tensor], **past: Any) -> lk.AdamW:
    return lk.AdamW(params, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, **past)


def soap(params: list[Tensor], **past: Any) -> lk.SOAP:
    """The later its gradients are, the longer a stage averages them, and the further it trains ahead."""
    return lk.SOAP(
        params, lr=1e-3, betas=(0.9, 0.95), beta1_delay=14, spike_compensation=1.0, weight_prediction=0.5, **past
    )


OPTIMIZERS = {"soap": soap, "nadam": nadam, "adamw": adamw}


def pipeline(
    x: Tensor, stages: int, optimizer: str, past: str, schedule: str, executor: str, accumulate: int = 1
) -> layerpipe.Pipeline:
    model = GPT(layers=4, width=256, heads=4, context=CONTEXT, vocabulary=256)
    return layerpipe.Pipeline(
        layerpipe.split(model, stages, (x,)),
        loss_fn,
        optimizer=OPTIMIZERS[optimizer],
        past=past,
        schedule=schedule,
        executor=executor,
        accumulate=accumulate,
        max_norm=1.0,
    )


def train(pipe: layerpipe.Pipeline, text: Tensor, steps: int, generator: torch.Generator) -> Iterator[float]:
    """The loss of every minibatch, or of its parts, in the order in which they leave the pipe."""
    parts = pipe.accumulate
    warmup = torch.optim.lr_scheduler.LambdaLR(pipe.optimizer, lambda step: min(1.0, (step + 1) / (100 * parts)))
    for _ in range(steps * parts):
        loss = pipe.step(*minibatch(text, generator, BATCH // parts))
        warmup.step()
        if loss is not None:
            yield loss.item()
    for loss in pipe.drain():
        yield loss.item()


@torch.no_grad()
def evaluate(pipe: layerpipe.Pipeline, text: Tensor) -> float:
    """Nats per byte, over the same ten minibatches every time."""
    pipe.eval()
    generator = torch.Generator().manual_seed(-1)
    batches = [minibatch(text, generator) for _ in range(10)]
    return torch.stack([loss_fn(pipe(x), y) for x, y in batches]).mean().item()


@torch.no_grad()
def write(pipe: layerpipe.Pipeline, prompt: str, count: int) -> str:
    text = torch.tensor([list(prompt.encode())])
    for _ in range(count):
        logits = pipe(text[:, -CONTEXT:])[0, -1]
        text = torch.cat([text, torch.multinomial((logits / 0.7).softmax(0), 1)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--optimizer", default="soap", choices=OPTIMIZERS)
    parser.add_argument("--accumulate", type=int, default=1, choices=(1, 2, 4, 8), help="parts of a minibatch")
    parser.add_argument("--past", default="blend", help="blend, stash, ema, latest")
    parser.add_argument("--schedule", default="lockstep", help="lockstep, 1f1b, sequential, auto")
    parser.add_argument("--executor", default="threads", choices=("threads", "serial"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=int, default=300, help="bytes to write at the end")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    text, unseen = sources()
    generator = torch.Generator().manual_seed(options.seed)
    x, _ = minibatch(text, generator)
    with pipeline(
        x, options.stages, options.optimizer, options.past, options.schedule, options.executor, options.accumulate
    ) as pipe:
        begin = time.perf_counter()
        with Progress() as progress:
            task = progress.add_task("training", total=options.steps * options.accumulate)
            for loss in train(pipe, text, options.steps, generator):
                progress.update(task, advance=1, description=f"loss {loss:.3f}")
        rate = options.steps * BATCH / (time.perf_counter() - begin)
        loss = evaluate(pipe, unseen)
        kept = sum(memory.history for memory in pipe.memory())
        print(f"delays {pipe.delays}, {rate:.0f} sequences/s, {kept / 1e6:.1f} MB kept for past weights")
        print(f"loss on modules it has not seen: {loss:.3f} nats per byte. It writes:\n")
        print(write(pipe, "def read(", options.write))


if __name__ == "__main__":
    main()
