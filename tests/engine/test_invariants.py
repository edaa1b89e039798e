"""What must always hold: the numbered invariants of the design."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe.stage.probe import ReconstructionProbe
from layerpipe.theory import retiming
from tests.engine.delayed_training import SGD, DelayedTraining, delayed_sgd
from tests.engine.models import chain, images, minibatches
from tests.engine.pipelines import assert_equal_state, train


def pipeline(stages: list[nn.Module], **options: Any) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(stages, F.cross_entropy, lambda params, **past: lk.SGD(params, **SGD, **past), **options)


@pytest.mark.invariant(1)
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
def test_one_stage_is_ordinary_training_bit_for_bit(schedule: str) -> None:
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    ours = resnet18(num_classes=10)
    theirs = copy.deepcopy(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), **SGD)
    data = images(4)
    want = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(x), y)
        loss.backward()
        optimizer.step()
        want.append(loss.detach())
    with pipeline([ours], schedule=schedule) as pipe:
        assert torch.equal(torch.stack(train(pipe, data)), torch.stack(want))
    assert_equal_state(ours.state_dict(), theirs.state_dict())


def test_sequential_schedule_of_many_stages_is_ordinary_training() -> None:
    torch.set_num_threads(1)
    stages, data = chain(), minibatches(10)
    plain = copy.deepcopy(nn.Sequential(*stages))
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for executor in ("serial", "threads"):
        with pipeline(copy.deepcopy(stages), schedule="sequential", executor=executor) as pipe:
            train(pipe, data)
            assert_equal_state(pipe.state_dict(), plain.state_dict())


@pytest.mark.invariant(2)
@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_stash_equals_an_independent_simulation_of_delayed_sgd(executor: str, schedule: str, stages: int) -> None:
    data = minibatches(25)
    simulated = delayed_sgd(chain(stages), data, schedule)
    options = {"executor": executor, "schedule": schedule, "threads_per_stage": torch.get_num_threads()}
    with pipeline(chain(stages), past="stash", **options) as pipe:
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), simulated.state_dict())


class MeanHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1))


def test_stash_equals_the_simulation_for_attention() -> None:
    """A transformer layer packs three projections into one weight and saves views of it."""

    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        layers: list[nn.Module] = [
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        ]
        return [*layers, MeanHead(8, 3)]

    data = [(torch.randn(4, 5, 8), torch.randint(3, (4,))) for _ in range(12)]
    simulated = delayed_sgd(stages(), data)
    with pipeline(stages(), past="stash") as pipe:
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), simulated.state_dict())


class PooledHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3)))


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_stash_equals_the_simulation_for_weights_in_channels_last(executor: str) -> None:
    """Convolutions save their weights with the strides they have, and so must the past be."""

    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 8), (8, 8))
        ]
        return [stage.to(memory_format=torch.channels_last) for stage in (*layers, PooledHead(8, 10))]

    data = [(x.to(memory_format=torch.channels_last), y) for x, y in images(12)]
    simulated = delayed_sgd(stages(), data)
    threads = torch.get_num_threads()
    ours = stages()
    with pipeline(ours, past="stash", executor=executor, threads_per_stage=threads) as pipe:
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), simulated.state_dict())
    assert ours[1][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("past", ["stash", "blend"])
def test_weights_may_change_their_order_while_minibatches_are_in_the_pipe(past: str) -> None:
    """A minibatch gets its weights as its forward found them."""

    def trained(turned: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        stages = [
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3),
            nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh()),
            PooledHead(8, 10),
        ]
        with pipeline(stages, past=past, executor="serial") as pipe:
            for step, (x, y) in enumerate(images(14)):
                if step == 7 and turned:
                    for stage in stages:
                        stage.to(memory_format=torch.channels_last)
                pipe.step(x, y)
            pipe.drain()
            return copy.deepcopy(pipe.state_dict())

    plain, turned = trained(False), trained(True)
    for name in plain:
        torch.testing.assert_close(turned[name], plain[name], rtol=1e-4, atol=1e-5)


class Spectral(nn.Module):
    """Complex numbers kept as pairs of real ones, as the filters of Fourier networks are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        plain, conjugated, third = torch.view_as_complex(self.weight)
        spectrum = torch.fft.rfft(x)
        negated = third.conj().imag * spectrum.real
        return torch.fft.irfft(spectrum * plain + spectrum * conjugated.conj() + negated, n=6)


def test_weights_read_as_complex_numbers_have_their_past() -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(6, 6), Spectral(), Spectral(), nn.Linear(6, 3)]

    data = minibatches(12)
    simulated = delayed_sgd(stages(), data)
    with pipeline(stages(), past="stash") as pipe, warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is copied
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), simulated.state_dict())


class Tables(nn.Linear):
    """Hands its weight on, and a buffer that its next forward changes in place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return super().forward(x), self.weight, self.weight[1:].t(), self.mean.expand_as(x)


class Mixing(nn.Linear):
    def forward(self, x: Tensor, weight: Tensor, part: Tensor, mean: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x @ weight + x @ part @ weight[1:] + mean)


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_a_weight_or_buffer_handed_on_is_that_of_its_forward(executor: str, schedule: str) -> None:
    """The next stage gets what a process of its own would get, not what the updates in between make of it."""

    def trained(alias: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        first, second, last = Tables(), Mixing(6, 6), nn.Linear(6, 3)
        if not alias:
            first.register_forward_hook(lambda module, inputs, outputs: tuple(y * 1 for y in outputs))
        with pipeline(
            [nn.Linear(6, 6), first, second, last], past="stash", schedule=schedule, executor=executor
        ) as pipe:
            train(pipe, minibatches(12))
            return copy.deepcopy(pipe.state_dict())

    assert_equal_state(trained(alias=True), trained(alias=False))


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@pytest.mark.filterwarnings("ignore:.*works on copies")
def test_copies_of_weights_are_right_too() -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [Cast(6, 6), Cast(6, 6), nn.Linear(6, 3)]

    data = minibatches(12)
    simulated = delayed_sgd(stages(), data)
    with pipeline(stages(), past="stash") as pipe:
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), simulated.state_dict())


def test_the_simulation_tells_stash_from_latest() -> None:
    data = minibatches(25)
    simulated = delayed_sgd(chain(3), data).state_dict()
    with pipeline(chain(3), past="latest") as pipe:
        train(pipe, data)
        assert not torch.equal(pipe.state_dict()["0.0.weight"], simulated["0.0.weight"])


@pytest.mark.invariant(3)
@pytest.mark.parametrize(
    ("past", "schedule"),
    [
        ("stash", "lockstep"),
        ("blend", "1f1b"),
        *(pytest.param(past, "lockstep", marks=pytest.mark.slow) for past in ("latest", "ema", "momentum", "blend")),
    ],
)
def test_serial_and_threads_give_the_same_weights(past: str, schedule: str) -> None:
    torch.set_num_threads(1)
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    torch.manual_seed(0)
    model, data = resnet18(num_classes=10), images(12, size=4)
    states, losses = [], []
    for executor in ("serial", "threads"):
        stages = layerpipe.split(copy.deepcopy(model), 4, (data[0][0],))
        with pipeline(stages, past=past, schedule=schedule, executor=executor, max_norm=1.0) as pipe:
            scheduler = torch.optim.lr_scheduler.LambdaLR(pipe.optimizer, lambda step: 1 / (1 + step))
            got = []
            for x, y in data:
                got.append(pipe.step(x, y))
                scheduler.step()
            losses.append([loss for loss in got if loss is not None] + pipe.drain())
            states.append(copy.deepcopy(pipe.state_dict()))
    assert_equal_state(*states)
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert states[0].keys() == model.state_dict().keys()


@pytest.mark.invariant(5)
@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize(("schedule", "registers"), [("lockstep", 2), ("1f1b", 1)])
@pytest.mark.parametrize("stages", [1, 2, 4, 7])
def test_measured_delay_is_that_of_the_retimed_graph(executor: str, schedule: str, registers: int, stages: int) -> None:
    data = minibatches(4 * stages + 10)
    with pipeline(chain(stages), executor=executor, schedule=schedule) as pipe:
        train(pipe, data)
        assert pipe.delays == retiming.delays(stages, schedule)
        assert pipe.delays == [registers * (stages - 1 - s) for s in range(stages)]
        for n, measured in zip(pipe.delays, pipe.measured_delays(), strict=True):
            # One backward each while the pipe fills, and the rule's n for all others.
            assert measured == {**dict.fromkeys(range(n), 1), n: len(data) - n}


def test_a_probe_that_comes_to_a_running_pipe_reads_from_when_it_knows_the_past() -> None:
    data = minibatches(30)
    with pipeline(chain(4), past="stash") as pipe:
        for x, y in data[:10]:
            pipe.step(x, y)
        first, second = (ReconstructionProbe(stage, every=1) for stage in pipe.stages[:2])
        begun = [stage.version for stage in pipe.stages]
        train(pipe, data[10:])
    for i, probe in enumerate((first, second)):
        assert [r.update for r in probe.readings] == list(range(begun[i] + pipe.delays[i], len(data)))
        assert probe.relative_error() == 0


@pytest.mark.parametrize("past", ["ema", "blend"])
def test_past_weights_in_the_engine_are_exact_while_it_fills_and_good_after(past: str) -> None:
    data = minibatches(120, size=32)
    stages = [stage.double() for stage in chain(4)]
    with pipeline(stages, past=past) as pipe:
        probes = [ReconstructionProbe(stage, every=1, samples=1000) for stage in pipe.stages[:-1]]
        train(pipe, [(x.double(), y) for x, y in data])
    for stage, probe in zip(pipe.stages, probes, strict=False):
        filling = [r for r in probe.readings if r.update <= stage.delay]
        assert len(filling) == stage.delay
        assert all(r.relative < 1e-20 for r in filling)
        assert len(probe.readings) == len(data) - 1
        error = probe.relative_error()
        assert error is not None
        assert error < 0.12


def soap(params: list[nn.Parameter], **options: Any) -> lk.SOAP:
    return lk.SOAP(params, lr=0.01, precondition_frequency=3, precondition=True, **options)


def muon(params: list[nn.Parameter], **options: Any) -> lk.Muon:
    return lk.Muon(params, lr=0.01, precondition=True, **options)


@pytest.mark.parametrize("optimizer", [soap, muon])
@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_stash_equals_the_simulation_with_preconditioned_optimizers(
    schedule: str, executor: str, optimizer: Any
) -> None:
    data = minibatches(20)
    stages = chain(4)
    DelayedTraining(stages, F.cross_entropy, optimizer, schedule=schedule, past="stash").train(data)
    options = {"executor": executor, "schedule": schedule, "threads_per_stage": torch.get_num_threads()}
    with layerpipe.Pipeline(chain(4), F.cross_entropy, optimizer, past="stash", **options) as pipe:
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), nn.Sequential(*stages).state_dict())


@pytest.mark.parametrize("optimizer", [lk.SOAP, lk.Muon])
def test_a_pipeline_tells_optimizers_its_embeddings_and_its_output_layer(optimizer: Any) -> None:
    torch.manual_seed(0)
    stages = [nn.Embedding(7, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.LayerNorm(3))]
    with layerpipe.Pipeline(stages, F.cross_entropy, lambda params, **past: optimizer(params, **past)) as pipe:
        train(pipe, [(torch.randint(7, (8,)), torch.randint(3, (8,))) for _ in range(6)])
        state = pipe.optimizer.state
        stepped = {name: "exp_avg_sq" in state[p] and "gram_left" not in state[p] for name, p in named(stages)}
    assert [name for name, adam in stepped.items() if adam] == ["0.weight", "2.1.weight"]


def named(stages: list[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in nn.Sequential(*stages).named_parameters() if p.ndim > 1]
