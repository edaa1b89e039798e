from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe
import layerpipe_kernels as lk
from layerpipe.models import catalog
from layerpipe.models.catalog import InputShape
from layerpipe.models.gpt import GPT
from layerpipe.models.resnet import resnet18
from layerpipe.partition.layers import Layer, LayerGraph
from layerpipe.partition.profile import profile
from layerpipe.theory.planning.machine import Machine
from layerpipe.theory.planning.memory import history_copies, stage_memory
from layerpipe.theory.planning.plan import SCHEDULES, plan, readable


def chain(layers: int = 8, width: int = 16, batch: int = 4) -> tuple[nn.Sequential, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers - 1)]
    return nn.Sequential(*blocks, nn.Linear(width, 3)), (torch.randn(batch, width),)


def layers() -> LayerGraph:
    return profile(*chain())


@pytest.mark.parametrize(("schedule", "factor"), [("lockstep", 2), ("1f1b", 1), ("sequential", 0)])
def test_delays_come_from_the_solver_and_agree_with_the_simulator(schedule: str, factor: int) -> None:
    found = plan(layers(), stages=4, schedule=schedule)
    assert [stage.delay for stage in found.stages] == [factor * s for s in (3, 2, 1, 0)]
    assert found.reports[schedule].staleness == [stage.delay for stage in found.stages]
    assert found.reports[schedule].in_flight == [stage.in_flight for stage in found.stages]


def test_the_stages_hold_every_layer_once_in_order() -> None:
    graph = layers()
    found = plan(graph, stages=3)
    assert list(itertools.chain.from_iterable(stage.layers for stage in found.stages)) == graph.layers
    assert found.stages[0].cost.received == graph.crossing[0]


def normalized() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Layers that keep what they are given where the one before has not kept it."""
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(16, 3)), (torch.randn(4, 16),)


def residual() -> tuple[nn.Module, tuple[Tensor, ...]]:
    pytest.importorskip("torchvision")
    return resnet18(width=8, channels=1, classes=3), (torch.randn(4, 1, 16, 16),)


def language() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Most of it is the embedding, which has no past, and the head, which has no delay."""
    model = GPT(layers=2, width=16, heads=2, context=8, vocabulary=500)
    return model, (torch.randint(500, (2, 8)),)


@pytest.mark.parametrize("past", ["stash", "latest", "ema", "momentum", "blend"])
@pytest.mark.parametrize("network", [chain, normalized, residual, language])
def test_predicted_memory_is_what_a_pipeline_measures(network: Any, past: str) -> None:
    model, (x,) = network()
    found = plan(profile(model, (x,)), stages=4, past=past)
    stages = layerpipe.split(model, 4, (x,), at=found.at)
    target = torch.zeros(x.shape if network is language else len(x), dtype=torch.long)
    pipe = layerpipe.Pipeline(
        stages,
        lambda y, t: nn.functional.cross_entropy(y.flatten(0, -2), t.flatten()),
        lambda params, **options: lk.SGD(params, lr=0.01, momentum=0.9, **options),
        past=past,
        schedule="lockstep",
    )
    with pipe:
        for _ in range(12):
            pipe.step(x.clone(), target)
        measured = pipe.memory()
    for stage, seen in zip(found.stages, measured, strict=True):
        predicted = stage.memory[past]
        assert predicted.weights == seen.weights
        assert predicted.history == seen.history
        # The engine also counts what a stash hands out where it lies.
        assert predicted.scratch == (0 if past == "stash" else seen.scratch)
        assert predicted.optimizer == seen.optimizer
        last = stage is found.stages[-1]
        # A mask or an index takes a few bytes; so do the targets and a mean's own numbers.
        assert seen.activations == pytest.approx(predicted.activations, rel=0.01, abs=256 if last else 0)


@pytest.mark.parametrize("past", ["stash", "latest", "blend"])
@pytest.mark.parametrize("network", [chain, normalized, language])
def test_what_is_said_to_do_does(network: Any, past: str) -> None:
    graph = profile(*network())
    for stages in (1, 2, 3):
        with pytest.raises(ValueError, match="would do") as error:
            plan(graph, stages=stages, memory_per_stage=1, past=past, simulate=())
        said = re.search(r"([0-9.]+) ([kM]?)B would do", str(error.value))
        assert said is not None
        enough = float(said[1]) * {"": 1.0, "k": 1e3, "M": 1e6}[said[2]]
        found = plan(graph, stages=stages, memory_per_stage=enough, past=past, simulate=())
        assert max(stage.memory[past].total for stage in found.stages) <= enough


@pytest.mark.parametrize(
    ("size", "text"),
    [(7, "7.00 B"), (999.1, "1000 B"), (1730.0001, "1.74 kB"), (17e6, "17.0 MB"), (1.7e9, "1.70 GB")],
)
def test_bytes_are_rounded_up(size: float, text: str) -> None:
    assert readable(size) == text


def test_an_update_is_momentum_sgd_with_a_blend_of_two_averages() -> None:
    """20 bytes per float32 weight, and two averages read and written."""
    assert Machine(memory=1.0).cost(Layer("layer", weights=4), 0).update == 20 + 2 * 8


def test_copies_per_kind() -> None:
    assert [history_copies(past, 6) for past in ("stash", "latest", "ema", "momentum", "blend")] == [6, 0, 1, 0, 2]
    assert [history_copies("blend", n) for n in (0, 1, 2, 3, 9)] == [0, 0, 1, 2, 2]
    assert history_copies("blend:order=3", 9) == 3
    with pytest.raises(ValueError, match="unknown"):
        history_copies("guess", 3)
    none = stage_memory(weights=100, largest=60, activations=7, delay=0, past="blend")
    assert none == (100, 100, 100, 0, 0, 7)


def test_weights_that_only_meet_data_need_no_past() -> None:
    model, (x,) = chain()
    found = plan(profile(model, (x,)), stages=4, past="stash").stages
    first, rest = found[0].layers[0].weights, sum(layer.weights for layer in found[0].layers[1:])
    assert found[0].memory["stash"].history == 6 * rest
    assert found[0].memory["stash"].weights == first + rest
    model[0] = nn.LayerNorm(16)  # whose backward reads its weight
    assert profile(model, (x,)).layers[0].no_past == 0


def test_the_fewest_stages_that_fit() -> None:
    graph = layers()
    whole = plan(graph, stages=1).stages[0].memory["blend"].total
    assert len(plan(graph, memory_per_stage=whole).stages) == 1
    cap = 0.7 * whole
    found = plan(graph, memory_per_stage=cap, schedule="1f1b")
    assert 1 < len(found.stages) < 8
    assert all(stage.memory["blend"].total <= cap for stage in found.stages)
    with pytest.raises(ValueError, match=r"no number of stages helps: .* would do"):
        plan(graph, memory_per_stage=10)
    with pytest.raises(ValueError, match=r"no cut into 2 stages keeps every stage to 10\.0 B"):
        plan(graph, stages=2, memory_per_stage=10)


def test_a_faster_machine_is_faster_and_slow_links_cost() -> None:
    graph = layers()
    base, fast = (plan(graph, stages=4, machine=Machine(flops=f, memory=f)) for f in (1e9, 2e9))
    for name in SCHEDULES:
        assert fast.reports[name].period < base.reports[name].period
        assert base.speedup(name) <= 4.001


def test_measured_times_take_the_place_of_predicted_ones() -> None:
    found = plan(profile(*chain(), measure=True), stages=2, balance="time")
    assert all(
        stage.cost.forward == sum((layer.seconds or (0,))[0] for layer in stage.layers) for stage in found.stages
    )


def test_tied_weights_on_both_sides_of_a_cut_are_refused() -> None:
    with torch.device("meta"):
        model = GPT(layers=2, width=16, heads=2, context=8, vocabulary=11, tied=True)
        tokens = torch.zeros(1, 8, dtype=torch.long)
    graph = profile(model, (tokens,))
    assert len(plan(graph, stages=1).stages) == 1
    with pytest.raises(ValueError, match=r"weight is used by tokens in stage 0 and by head in stage 1.*by hand"):
        plan(graph, stages=2)


def test_a_layer_used_twice_has_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))

    graph = profile(Twice(), (torch.zeros(2, 4),))
    assert [layer.name for layer in graph.layers] == ["a", "b", "a#2"]
    assert {name for name, _, _ in graph.tied} == {"a.weight", "a.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 99}, "8 places to begin one"),
        ({"schedule": "other"}, "lockstep, 1f1b"),
        ({"schedule": "gpipe"}, "not derived by retiming: it puts no register anywhere"),
        ({"past": "guess"}, "stash, latest"),
        ({"simulate": ["chimera"]}, "gpipe"),
        ({"balance": "time"}, "measure=True"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(layers(), **options)  # type: ignore[arg-type]


def test_the_plan_as_json_round_trips() -> None:
    found = json.loads(json.dumps(plan(layers(), stages=3).to_json()))
    assert [stage["delay"] for stage in found["stages"]] == [4, 2, 0]
    assert set(found["schedules"]) == set(SCHEDULES)


def test_a_billion_parameters_without_memory() -> None:
    options = {"layers": 22, "width": 2048, "heads": 16, "context": 64}
    model, inputs = catalog.load("gpt2", batch=1, options=options)
    assert all(p.is_meta for p in model.parameters())
    found = plan(profile(model, inputs), stages=64, simulate=["1f1b"])
    assert sum(stage.parameters for stage in found.stages) > 1e9
    assert [stage.delay for stage in found.stages] == [2 * (63 - s) for s in range(64)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16", "gpt2", "mlp"])
def test_the_catalogue_builds_without_memory(name: str) -> None:
    if name in ("resnet18", "resnet50", "vgg16"):
        pytest.importorskip("torchvision")
    model, inputs = catalog.load(name, batch=2)
    assert all(p.is_meta for p in model.parameters())
    assert all(x.is_meta and len(x) == 2 for x in inputs.args)
    assert model(*inputs.args).shape[0] == 2


def test_a_model_of_ones_own() -> None:
    options = {"in_features": 4, "out_features": 2}
    model, inputs = catalog.load("torch.nn:Linear", batch=3, options=options, inputs=[InputShape((4,))])
    assert model(*inputs.args).shape == (3, 2)
    model, inputs = catalog.load("torch.nn:Linear", batch=3, options=options, inputs=[InputShape((4,), name="input")])
    assert not inputs.args
    assert len(profile(model, inputs)) == 1
    for name, options, message in (
        ("nothing", {}, "resnet18, resnet50"),
        ("torch.nn:Linear", {}, "--input 3,224,224"),
        ("mlp", {"colour": 1}, "does not take these options.*colour"),
    ):
        with pytest.raises(ValueError, match=message):
            catalog.load(name, batch=1, options=options)
    with pytest.raises(ValueError, match="no function or class 'Nothing'"):
        catalog.load("torch.nn:Nothing", batch=1, inputs=[InputShape((4,))])
    with pytest.raises(ImportError, match="no_such_package"):
        catalog.load("no_such_package:f", batch=1, inputs=[InputShape((4,))])
    with pytest.raises(ValueError, match="not an nn"):
        catalog.load("builtins:dict", batch=1, inputs=[InputShape((4,))])


@pytest.mark.parametrize("accumulate", [2, 4, 7])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
def test_accumulation_makes_delays_smaller_in_the_rule_and_in_the_simulator(schedule: str, accumulate: int) -> None:
    found = plan(layers(), stages=4, schedule=schedule, accumulate=accumulate)
    lags = [stage.delay for stage in plan(layers(), stages=4, schedule=schedule).stages]
    assert [stage.delay for stage in found.stages] == [-(-lag // accumulate) for lag in lags]
    assert found.reports[schedule].staleness == [stage.delay for stage in found.stages]
    assert found.reports[schedule].in_flight == [stage.in_flight for stage in found.stages]
    assert found.to_json()["accumulate"] == accumulate
    assert [stage.memory["stash"].history for stage in found.stages[1:]] == [
        stage.delay * stage.memory["stash"].weights for stage in found.stages[1:]
    ]
