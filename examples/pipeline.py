"""Your own network as a pipeline: split it, train it from a DataLoader, save it, evaluate it.

    python examples/pipeline.py                                    # two stages in two threads
    python examples/pipeline.py --executor serial                  # the same weights, easier to debug
    torchrun --nproc-per-node 2 examples/pipeline.py --executor distributed

The network learns scikit-learn's handwritten digits. With --checkpoint the run can be interrupted and goes on, also
with another executor or number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerpipe
import layerpipe_kernels as lk
from layerpipe import data


def network() -> nn.Module:
    def block(channels: int, width: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

    layers = [*block(1, 32, 1), *block(32, 32, 1), *block(32, 64, 2), *block(64, 64, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", default="threads", help="serial, threads, distributed; on a GPU streams, graphs")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch, and gone on from if it is there")
    options = parser.parse_args()

    if options.executor == "distributed":
        torch.distributed.init_process_group("gloo")
    first = os.environ.get("RANK", "0") == "0"  # of the processes of a distributed run, one prints
    torch.manual_seed(0)  # and all make the same network and minibatches
    digits = data.load("digits", Path("data"))
    loader = DataLoader(TensorDataset(digits.train_x, digits.train_y), batch_size=64, shuffle=True, drop_last=True)

    device = torch.device(options.device)
    test_x, test_y = digits.test_x.to(device), digits.test_y.to(device)
    stages = layerpipe.split(network().to(device), options.stages, example_inputs=(test_x[:64],))
    with layerpipe.Pipeline(
        stages,
        nn.functional.cross_entropy,
        optimizer=lambda params, **past: lk.SGD(
            params, lr=0.05, momentum=0.9, weight_decay=1e-4, capturable=options.executor == "graphs", **past
        ),
        executor=options.executor,
    ) as pipe:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(pipe.optimizer, options.epochs * len(loader))
        begin = 0
        if options.checkpoint is not None:
            with contextlib.suppress(FileNotFoundError):  # raised in all processes: the first one has the file, or not
                extra = pipe.resume(options.checkpoint)
                scheduler.load_state_dict(extra["scheduler"])
                begin = extra["epoch"]
        for epoch in range(begin, options.epochs):
            losses = []
            for x, y in loader:
                loss = pipe.step(x.to(device), y.to(device))  # of the minibatch that left the pipe; None while it fills
                scheduler.step()
                if loss is not None:
                    losses.append(loss)
            losses += pipe.drain()  # finish what is in flight
            pipe.eval()
            correct = pipe(test_x).argmax(1) == test_y
            pipe.train()
            if first:
                loss, accuracy = torch.stack(losses).mean(), correct.float().mean()
                print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
            if options.checkpoint is not None:
                pipe.checkpoint(options.checkpoint, epoch=epoch + 1, scheduler=scheduler.state_dict())
        if first:
            print(f"updates between a minibatch's forward and its backward, by stage: {pipe.delays}")


if __name__ == "__main__":
    main()
