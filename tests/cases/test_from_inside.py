"""Whatever a loss, a stage or an optimizer returns or asks for, the answer is right or an error that names the stage,
and nothing hangs."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.cases import programs
from tests.cases.programs import weights
from tests.distributed.processes import Failure, Processes
from tests.engine.fake_device import fake_device
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, pipeline, sgd

# -- infinities that are no divergence -------------------------------------------------------------------------------


class Embed(nn.Embedding):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(ids), nn.Transformer.generate_square_subsequent_mask(ids.shape[1])


class Encoder(nn.TransformerEncoderLayer):
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x, src_mask=mask), mask


class Classes(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).flatten(0, 1)


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.tensor([False, False, True]), float("-inf"))


class Nearest(nn.Module):
    """Distances with infinity where there is nothing to be near to, and the least of them in the next stage."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.abs().masked_fill(x < 0, float("inf"))


class Least(nn.Linear):
    def forward(self, x: Tensor, distance: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + distance.amin(1, keepdim=True).clamp(max=1.0)


def causal() -> list[nn.Module]:
    return [Embed(11, 8), Encoder(8, 2, 16, dropout=0.0, batch_first=True), Classes(8, 11)]


def masked_logits() -> list[nn.Module]:
    return [nn.Linear(6, 6), Masked(6, 3), nn.Identity()]


def nearest() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(6, 6), Nearest()), Least(6, 3)]


def biased() -> list[nn.Module]:
    """A weight that is infinite on purpose, from the beginning."""
    last = nn.Linear(6, 3)
    with torch.no_grad():
        last.bias[2] = float("-inf")
    return [nn.Linear(6, 6), last]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("make", [causal, masked_logits, nearest, biased])
def test_infinities_on_purpose_cross_and_train_as_in_a_plain_loop(make: Any, executor: str) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(2, (8,), generator=generator)) for _ in range(10)]
    if make is causal:
        data = [(torch.randint(11, (4, 5)), torch.randint(11, (20,))) for _ in range(10)]
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(make())
    stages, theirs = made
    optimizer = lk.SGD([p for stage in theirs for p in stage.parameters()], lr=0.05, momentum=0.9)
    losses = []
    with pipeline(stages, schedule="sequential", executor=executor) as pipe:
        for x, y in data:
            out: Any = (x,)
            for stage in theirs:
                out = stage(*out)
                out = out if isinstance(out, tuple) else (out,)
            optimizer.zero_grad()
            loss = F.cross_entropy(*out, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            pipe.step(x, y)
        pipe.drain()
    assert all(map(math.isfinite, losses))
    for a, b in zip(weights(nn.Sequential(*stages)), weights(nn.Sequential(*theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Spoils(nn.Linear):
    """Makes something no number or infinite in the fourth minibatch."""

    calls = 0

    def __init__(self, what: str, value: float) -> None:
        super().__init__(6, 6)
        self.what, self.value = what, value

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x)
        if self.calls == 4 and self.what == "output":
            y = y.masked_fill(torch.arange(6) == 2, self.value)
        if self.calls == 4 and self.what == "gradient":
            y.register_hook(lambda g: torch.full_like(g, self.value))
        return y


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("output", float("nan"), "stage 1 .*the output of minibatch 3"),
        ("gradient", float("nan"), "stage 1 .*the gradient of minibatch 3"),
        ("gradient", float("inf"), "stage 1 .*the gradient of minibatch 3"),
        ("loss", float("nan"), "stage 2 .*the loss of minibatch 3"),
        ("loss", float("inf"), "stage 2 .*the loss of minibatch 3"),
        ("loss", float("-inf"), "stage 2 .*the loss of minibatch 3"),
    ],
)
def test_what_is_no_number_and_infinite_losses_and_gradients_are_divergence(
    what: str, value: float, said: str, executor: str
) -> None:
    calls = []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        calls.append(0)
        made = F.cross_entropy(out, y)
        return made + value if what == "loss" and len(calls) == 4 else made

    stages = [nn.Linear(6, 6), Spoils(what, value), nn.Linear(6, 3)]
    with (
        layerpipe.Pipeline(stages, loss, sgd, executor=executor) as pipe,
        pytest.raises(layerpipe.DivergenceError, match=said),
    ):
        for x, y in minibatches(12):
            pipe.step(x, y)
        pipe.drain()


# -- what a loss returns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda loss: (loss, loss.detach()), "got a tuple"),
        (lambda loss: [loss], "got a list"),
        (lambda loss: {"loss": loss}, "got a dict"),
        (lambda loss: loss.item(), r"got a float: .*leave out \.item\(\)"),
        (lambda loss: None, "got a NoneType: it has no return"),
        (lambda loss: loss.detach().numpy(), "got a ndarray"),
        (lambda loss: loss.expand(8), r"got a tensor of shape \(8,\): take its mean"),
        (lambda loss: loss.expand(0), r"got a tensor of shape \(0,\)"),
        (lambda loss: loss * 1j, "real number, got a tensor of torch.complex64"),
        (lambda loss: loss.long(), "real number, got a tensor of torch.int64"),
    ],
)
def test_a_loss_that_is_not_one_number_is_told_what_to_return(
    given: Callable[[Tensor], Any], said: str, executor: str
) -> None:
    with (
        layerpipe.Pipeline(chain(2), lambda out, y: given(F.cross_entropy(out, y)), sgd, executor=executor) as pipe,
        pytest.raises(layerpipe.StageError, match=rf"stage 1 .*loss_fn must return one .*{said}"),
    ):
        for x, y in minibatches(4):
            pipe.step(x, y)
        pipe.drain()


# -- what is asked from inside ---------------------------------------------------------------------------------------

ASKED: dict[str, Callable[[layerpipe.Pipeline], Any]] = {
    "pipe(x)": lambda pipe: pipe(torch.randn(2, 6)),
    "state_dict": lambda pipe: pipe.state_dict(),
    "load_state_dict": lambda pipe: pipe.load_state_dict({}),
    "step": lambda pipe: pipe.step(*minibatches(1)[0]),
    "drain": lambda pipe: pipe.drain(),
    "train": lambda pipe: pipe.train(),
    "eval": lambda pipe: pipe.eval(),
    "in_flight": lambda pipe: pipe.in_flight,
    "memory": lambda pipe: pipe.memory(),
    "measured_delays": lambda pipe: pipe.measured_delays(),
    "watch": lambda pipe: pipe.watch(None),
    "checkpoint": lambda pipe: pipe.checkpoint("/nowhere/run.pt"),
    "resume": lambda pipe: pipe.resume("/nowhere/run.pt"),
    "optimizer.state": lambda pipe: pipe.optimizer.state,
    "optimizer.state_dict": lambda pipe: pipe.optimizer.state_dict(),
    "optimizer.register_step_pre_hook": lambda pipe: pipe.optimizer.register_step_pre_hook(lambda *_: None),
    "deepcopy": lambda pipe: copy.deepcopy(pipe),
}
SERVED: dict[str, Callable[[layerpipe.Pipeline], Any]] = {
    "options": lambda pipe: [group["lr"] for group in pipe.optimizer.param_groups],
    "what does not change": lambda pipe: (pipe.delays, pipe.names, pipe.latency, pipe.loss_fn),
    "parameters": lambda pipe: [p.shape for p in pipe.parameters()],
}


class Asks(nn.Module):
    def __init__(self, where: str, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.where, self.ask = where, ask

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            self.ask()
        y = x * 1.0
        if self.where == "backward" and y.requires_grad:
            y.register_hook(lambda g: self.ask() and None)
        return y


def asked(where: str, executor: str, ask: Callable[[layerpipe.Pipeline], Any]) -> str:
    """What becomes of a short run whose second stage asks in its third minibatch."""
    box: dict[str, Any] = {"calls": 0, "end": "hangs"}

    def call(*_: Any) -> None:
        box["calls"] += 1
        if box["calls"] == 3:
            ask(box["pipe"])

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if where == "loss":
            call()
        return F.cross_entropy(out, y)

    def make(params: Any, **past: Any) -> lk.SGD:
        optimizer = sgd(params, **past)
        if where == "update" and not past["delay"]:
            optimizer.register_step_post_hook(call)
        return optimizer

    def train() -> None:
        try:
            for x, y in minibatches(8):
                box["pipe"].step(x, y)
            box["pipe"].drain()
            box["end"] = "finished"
        except Exception as error:
            box["end"] = f"{type(error).__name__}: {error}"

    stages = [nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), Asks(where, call)), nn.Linear(6, 3)]
    with fake_device(), layerpipe.Pipeline(stages, loss, make, executor=executor) as box["pipe"]:
        if executor == "streams":
            train()
        else:
            thread = threading.Thread(target=train, daemon=True)
            thread.start()
            thread.join(30)
    end: str = box["end"]
    return end


@pytest.mark.parametrize("executor", [*EXECUTORS, "streams"])
@pytest.mark.parametrize("where", ["forward", "backward", "loss", "update"])
def test_what_waits_for_all_stages_is_refused_inside_one(where: str, executor: str) -> None:
    stage = {"forward": 1, "backward": 1, "loss": 2, "update": 2}[where]
    for what, ask in ASKED.items():
        end = asked(where, executor, ask)
        said = {"resume": "drain", "load_state_dict": "drain", "deepcopy": "cannot be copied"}.get(what, "from inside")
        assert end.startswith(f"StageError: stage {stage} ("), (what, end)
        assert said in end, (what, end)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_waits_for_nobody_is_served_inside_a_stage(executor: str) -> None:
    for what, ask in SERVED.items():
        for where in ("forward", "backward", "loss", "update"):
            assert asked(where, executor, ask) == "finished", (what, where)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_error_that_the_loss_catches_changes_nothing(executor: str) -> None:
    found = []
    for curious in (False, True):
        stages = chain(3)

        def loss(out: Tensor, y: Tensor, curious: bool = curious) -> Tensor:
            for ask in ASKED.values() if curious else ():
                with pytest.raises((RuntimeError, TypeError)):
                    ask(pipe)
            return F.cross_entropy(out, y)

        with layerpipe.Pipeline(stages, loss, sgd, executor=executor) as pipe:
            for x, y in minibatches(8):
                pipe.step(x, y)
            pipe.drain()
        found.append(weights(nn.Sequential(*stages)))
    assert all(map(torch.equal, *found))


def test_another_pipeline_may_be_asked() -> None:
    teacher = pipeline(chain(2, seed=1), executor="threads").eval()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(torch.ones(8, 6)).softmax(1)
        return F.cross_entropy(out, wanted)

    with teacher, layerpipe.Pipeline(chain(3), loss, sgd, executor="threads") as pipe:
        for x, y in minibatches(8):
            pipe.step(x, y)
        assert len(pipe.drain()) > 0


def test_a_question_from_inside_one_process_is_an_error_in_all(two: Processes) -> None:
    for where, what in (("forward", "pipe(x)"), ("loss", "drain")):
        for result in two.run(programs.asks, where, what):
            assert isinstance(result, Failure)
            assert result.kind == "StageError"
            assert "from inside a stage" in result.message


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_pipeline_is_not_copied_and_its_layers_are(executor: str) -> None:
    with pipeline(executor=executor) as pipe:
        rate = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.9)
        for x, y in minibatches(5):
            pipe.step(x, y)
        for thing, said in ((pipe, r"pipe\.checkpoint"), (pipe.optimizer, "state_dict"), (rate, "state_dict")):
            for function in (copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match=f"cannot be copied or pickled.*{said}"):
                    function(thing)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.copy(pipe)
        pipe.optimizer.state  # noqa: B018  # until the stages are idle
        copied = copy.deepcopy(pipe.modules)
        assert all(map(torch.equal, weights(nn.Sequential(*copied)), weights(nn.Sequential(*pipe.modules))))
        assert len(pipe.drain()) > 0
