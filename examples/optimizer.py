"""One line changed: an SGD that also knows the weights of six updates ago.

    python examples/optimizer.py

A small network learns scikit-learn's handwritten digits twice, with torch's SGD and with ours: the weights agree bit
for bit. Then the past weights that ours reconstructs are compared with the true ones, which only this script keeps.
"""

from __future__ import annotations

import collections
from pathlib import Path

import torch
from torch import nn

import layerpipe_kernels as lk
from layerpipe import data

DELAY, STEPS = 6, 300


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def main() -> None:
    digits = data.load("digits", Path("data"))
    theirs, ours = network(), network()
    reference = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, foreach=False)
    optimizer = lk.SGD(ours.parameters(), lr=0.05, momentum=0.9, delay=DELAY, past="blend")

    weight, history = ours[1].weight, collections.deque[torch.Tensor](maxlen=DELAY + 1)
    for _, (x, y) in zip(range(STEPS), digits.batches(64, seed=0), strict=False):
        for model, step in ((theirs, reference), (ours, optimizer)):
            step.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            step.step()
        history.append(weight.detach().clone())

    equal = all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    true, latest, past = history[0], history[-1], optimizer.past_weight(weight)
    error = ((past - true).square().sum() / (latest - true).square().sum()).item()
    accuracy = (ours(digits.test_x).argmax(1) == digits.test_y).float().mean().item()
    print(f"after {STEPS} steps: test accuracy {accuracy:.1%}, weights equal to torch's bit for bit: {equal}")
    print(f"weights {DELAY} updates ago: mean-square error {error:.4f} of that of the latest weights")


if __name__ == "__main__":
    main()
