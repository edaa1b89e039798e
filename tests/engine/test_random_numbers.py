"""Random layers draw the same numbers whoever runs the stages, and nobody else's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import layerpipe
from layerpipe.stage import random_numbers
from layerpipe.stage.other_generators import Watch
from layerpipe.stage.random_numbers import seed
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import sgd


class Random(nn.Module):
    """A layer, and what draws."""

    def __init__(self, layer: nn.Module, draw: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.draw = layer, draw
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)
        self.lstm = nn.LSTM(6, 6, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.draw(self, x))  # type: ignore[no-any-return]


def in_place(_: Any, x: Tensor) -> Tensor:
    noise = torch.empty_like(x)
    noise.uniform_(0.9, 1.1).log_normal_(0, 0.1)
    return x * noise.exponential_().clamp(0.5, 2) * torch.empty(6).normal_()


def attention(_: Any, x: Tensor) -> Tensor:
    q = x.view(2, 2, -1, 6)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.4).reshape_as(x)


DRAWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout": lambda _, x: F.dropout(x, 0.3),
    "alpha_dropout": lambda _, x: F.alpha_dropout(x, 0.3, True),
    "feature_dropout": lambda _, x: F.dropout1d(x[None], 0.3, True)[0],
    "rrelu": lambda _, x: F.rrelu(x, 0.1, 0.9, True),
    "rand, randn": lambda _, x: x * torch.rand(6) + torch.randn(x.shape, dtype=x.dtype),
    "like": lambda _, x: x * torch.rand_like(x) + torch.randn_like(x) * torch.randint_like(x, 3),
    "bernoulli": lambda _, x: x * torch.bernoulli(x.sigmoid()),
    "randint, randperm": lambda _, x: x[:, torch.randperm(6)] * torch.randint(1, 3, (6,)) + torch.randint(2, (6,)),
    "multinomial, normal": lambda _, x: x[:, torch.multinomial(torch.ones(6), 6)] + torch.normal(0.0, x.detach().abs()),
    "in place": in_place,
    "attention": attention,
    "MultiheadAttention": lambda self, x: self.attention(x[None], x[None], x[None])[0][0],
    "LSTM": lambda self, x: self.lstm(x[None])[0][0],
    "gumbel": lambda _, x: F.gumbel_softmax(x, 0.7),
    "distributions": lambda _, x: x * torch.distributions.Gamma(torch.ones(6), torch.ones(6)).sample(),
    "a generator of its own": lambda _, x: x * torch.rand(6, generator=torch.Generator().manual_seed(3)),
}  # fmt: skip


def noisy_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output + 0.1 * torch.rand_like(output), target)


def stages(draw: str, count: int = 3) -> list[nn.Module]:
    return [Random(layer, DRAWS[draw]) for layer in chain(count)]


def make(modules: list[nn.Module], executor: str, loss_fn: Any = F.cross_entropy, **options: Any) -> layerpipe.Pipeline:
    torch.manual_seed(5)
    return layerpipe.Pipeline(modules, loss_fn, sgd, executor=executor, **options)


def train(pipe: layerpipe.Pipeline, ticks: int = 14) -> tuple[list[Tensor], dict[str, Tensor]]:
    losses = [pipe.step(x, y) for x, y in minibatches(ticks)] + pipe.drain()
    return [loss for loss in losses if loss is not None], copy.deepcopy(pipe.state_dict())


def assert_same(one: tuple[list[Tensor], dict[str, Tensor]], other: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    assert torch.equal(torch.stack(one[0]), torch.stack(other[0]))
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("draw", DRAWS)
def test_threads_draw_what_one_thread_draws(draw: str) -> None:
    with make(stages(draw), "serial", noisy_loss) as serial, make(stages(draw), "threads", noisy_loss) as threads:
        assert_same(train(threads), train(serial))


def test_callers_numbers_are_their_own() -> None:
    """A data loader that draws from torch's generator sees the same data whatever the stages draw."""
    torch.manual_seed(5)
    want = torch.rand(14)
    for executor in ("serial", "threads"):
        with make(stages("dropout"), executor) as pipe:
            drawn = []
            for x, y in minibatches(14):
                drawn.append(torch.rand(()))
                pipe.step(x, y)
            pipe.drain()
        assert torch.equal(torch.stack(drawn), want)


def test_every_stage_and_seed_has_numbers_of_its_own() -> None:
    with make(stages("dropout"), "serial") as pipe:
        first = [stage.random.generator.get_state() for stage in pipe.stages if stage.random is not None]
    assert len(first) == 3
    assert not any(torch.equal(first[0], other) for other in first[1:])
    before = seed()
    assert seed() == before  # nothing was drawn
    torch.rand(1)
    assert seed() != before


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_one_stage_draws_as_a_plain_loop_does(executor: str) -> None:
    (plain,) = stages("dropout", 1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(5)
    for x, y in minibatches(6):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    with make(stages("dropout", 1), executor) as pipe:
        _, state = train(pipe, 6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[f"0.{name}"], value, rtol=1e-5, atol=1e-6)


def test_only_what_draws_is_watched() -> None:
    """A stage without random layers pays for nothing after its first minibatch."""
    modules = [*chain(3)[:2], Random(chain(1)[0], DRAWS["dropout"])]
    with make(modules, "threads") as pipe:
        for x, y in minibatches(4):
            pipe.step(x, y)
        pipe.memory()  # waits for the stages
        assert [stage.random is not None and stage.random.draws for stage in pipe.stages] == [False, False, True]
        assert pipe.stages[2].random is not None
        assert pipe.stages[0].random is not None
        for stage, what in ((0, "forward"), (2, "loss")):  # but for generators that are not torch's
            random = pipe.stages[stage].random
            assert random is not None
            assert isinstance(random.during(what), Watch)


@pytest.mark.parametrize("drained", [False, True])
def test_layers_that_begin_to_draw_draw_their_stages_numbers(drained: bool) -> None:
    """After train() in the middle of a run, or in whatever way once the pipe was empty."""

    def run(executor: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        layers = [nn.Dropout(0.4), nn.Dropout(0.4)]
        modules = [nn.Sequential(layer, dropout) for layer, dropout in zip(chain(3), layers, strict=False)]
        with make([*modules, chain(1)[0]], executor) as pipe:
            if drained:
                for layer in layers:
                    layer.eval()
                train(pipe, 6)
                for layer in layers:
                    layer.train()
            else:
                pipe.eval()
                for x, y in minibatches(6):
                    pipe.step(x, y)
                pipe.train()
            torch.rand(1)  # the caller's
            return train(pipe, 30)

    serial, *others = (run(executor) for executor in ("serial", "threads", "threads"))
    for other in others:
        assert torch.equal(torch.stack(other[0][-20:]), torch.stack(serial[0][-20:]))
        assert all(torch.equal(value, other[1][name]) for name, value in serial[1].items())


# -- recomputation ---------------------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    def __init__(self, layers: nn.Module, *, recompute: bool) -> None:
        super().__init__()
        self.layers, self.recompute = layers, recompute

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False) if self.recompute else self.layers(x)  # type: ignore[no-any-return]


def recomputing(recompute: bool) -> list[nn.Module]:
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 6), nn.Tanh()) for _ in chain(2)]
    return [*(Recomputed(layer, recompute=recompute) for layer in layers), nn.Linear(6, 3)]


def test_a_recomputation_draws_its_forwards_numbers_again() -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        with make(recomputing(recompute), "serial", past="stash") as pipe:
            results.append(train(pipe))
    assert_same(*results)


def test_threads_refuse_a_recomputation_that_draws() -> None:
    """torch.utils.checkpoint would set back the generator that other threads draw from."""
    torch.manual_seed(0)
    said = r"stage 1.*executor='serial'"
    with make(recomputing(True), "threads") as pipe, pytest.raises(layerpipe.StageError, match=said):
        train(pipe)


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["serial", "threads"])
@pytest.mark.parametrize("after", ["serial", "threads"])
def test_training_goes_on_with_the_same_numbers(before: str, after: str, tmp_path: Path) -> None:
    with make(stages("dropout"), "serial") as whole:
        train(whole, 9)
        want = train(whole, 9)
    with make(stages("dropout"), before) as first:
        train(first, 9)
        first.checkpoint(tmp_path / "c.pt")
    torch.manual_seed(99)
    with make(stages("dropout"), after) as second:
        second.resume(tmp_path / "c.pt")
        assert_same(train(second, 9), want)


def test_a_file_without_stages_numbers_is_read(tmp_path: Path) -> None:
    with make(stages("dropout"), "serial") as pipe:
        pipe.checkpoint(tmp_path / "c.pt")
        content = torch.load(tmp_path / "c.pt")
        del content["random_of_stages"]
        content["layerpipe"] = 1  # the format without a checksum
        torch.save(content, tmp_path / "c.pt")
        pipe.resume(tmp_path / "c.pt")


ASKING = """
import faulthandler, gc, time
import torch
from tests.engine.models import minibatches
from tests.engine.pipelines import pipeline


class Asking(torch.nn.Linear):
    def forward(self, x):
        for _ in range(100):  # as torch.utils.checkpoint does once
            torch.set_rng_state(torch.get_rng_state())
        return super().forward(x)


faulthandler.dump_traceback_later(60, exit=True)
gc.set_threshold(10)
gc.callbacks.append(lambda *_: time.sleep(0))  # another thread's turn, while torch holds its generator's lock
with pipeline([Asking(6, 6), Asking(6, 6), Asking(6, 3)], executor="threads") as pipe:
    for x, y in minibatches(20):
        pipe.step(x, y)
"""


def test_threads_that_ask_for_torchs_state_go_on() -> None:
    """In a process of its own: it would stop with the GIL held, where no timeout of Python's can fire."""
    done = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_fork_waits_until_nobody_asks_for_torchs_state() -> None:
    """Data loaders fork, and their workers seed first of all."""
    taken, asking = threading.Event(), random_numbers._ALONE

    def ask() -> None:
        with asking:
            taken.set()
            time.sleep(0.2)

    thread = threading.Thread(target=ask)
    thread.start()
    taken.wait()
    child = os.fork()
    if not child:
        os._exit(0 if asking.acquire(timeout=20) else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
