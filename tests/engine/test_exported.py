"""Models that torch.fx cannot trace are split through torch.export: the same numbers, names, modes and sizes."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import layerpipe
import layerpipe_kernels
from layerpipe import split
from layerpipe.partition.profile import profile
from layerpipe.partition.split_stage import label
from layerpipe.theory.planning.plan import plan
from tests.engine.exported_models import ShapedBranches, ShapedConv, ShapedGPT, ShapedLayers
from tests.engine.models import through

CASES: dict[str, tuple[type[nn.Module], Callable[[int], Tensor], int]] = {
    "gpt": (ShapedGPT, lambda b: torch.randint(11, (b, 6)), 5),
    "conv": (ShapedConv, lambda b: torch.randn(b, 3, 8, 8), 3),
    "branches": (ShapedBranches, lambda b: torch.randn(b, 8), 4),
    "layers": (ShapedLayers, lambda b: torch.randn(b, 5, 8), 4),
}
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def attention_is_the_same_in_both_modes() -> bool:
    """torch 2.11 exports it with other operations where it may drop something."""
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True), torch.zeros(2, 3, 8)
    alone = {"need_weights": False}
    graphs = [torch.export.export(attention.train(mode), (x, x, x), alone).graph for mode in (False, True)]
    first, second = ([node.target for node in graph.nodes if node.op == "call_function"] for graph in graphs)
    return first == second


def make(case: str, stages: int | None = None) -> tuple[nn.Module, nn.Module, list[nn.Module], Callable[[int], Tensor]]:
    """A model, a copy of it, and its stages."""
    if case == "layers" and not attention_is_the_same_in_both_modes():
        pytest.skip("this torch exports attention with other operations in training")
    torch.manual_seed(0)
    factory, inputs, most = CASES[case]
    model = factory()
    with pytest.raises((fx.proxy.TraceError, TypeError)):  # else these tests would not test the export
        fx.symbolic_trace(model)
    return model, copy.deepcopy(model), split(model, stages or most, (inputs(4),)), inputs


@every_case
def test_training_is_the_models_own_bit_by_bit(case: str) -> None:
    model, reference, parts, inputs = make(case)
    for batch in (4, 7):  # also one that the trace has not seen
        x, results = inputs(batch), []
        for network, run in ((model, lambda x: through(parts, x)), (reference, reference)):
            network.zero_grad()
            torch.manual_seed(1)
            y = run(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in network.parameters()), *network.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_case
def test_modes_can_be_changed_after_the_split(case: str) -> None:
    _, reference, parts, inputs = make(case)
    x = inputs(3)
    for part in parts:
        part.eval()
    assert torch.equal(through(parts, x), reference.eval()(x))
    if case in ("gpt", "conv", "layers"):  # which drop out
        for part in parts:
            part.train()
        assert not torch.equal(through(parts, x), through(parts, x))


@every_case
def test_names_are_the_models_own(case: str) -> None:
    model, _, parts, _ = make(case)
    owned = [name for part in parts for name in part.state_dict()]
    assert sorted(owned) == sorted(model.state_dict())
    params = dict(model.named_parameters())
    assert all(params[name] is p for part in parts for name, p in part.named_parameters())


def test_torchs_own_layers_are_called_as_modules() -> None:
    model, _, parts, inputs = make("gpt")
    called = []
    model.blocks[1].up.register_forward_hook(lambda *_: called.append("up"))  # type: ignore[union-attr,index]
    through(parts, inputs(2))
    assert called == ["up"]
    assert label(parts[0]).startswith("tokens")
    assert label(parts[-1]).endswith("head")


def test_the_model_is_left_as_it_was() -> None:
    model, reference, _, _ = make("gpt")
    assert [name for name, _ in model.named_modules()] == [name for name, _ in reference.named_modules()]
    assert [m.training for m in model.modules()] == [m.training for m in reference.modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    )


def test_stages_can_be_copied_pickled_and_moved() -> None:
    _, _, parts, inputs = make("layers")
    x = inputs(2)
    for part in parts:
        part.eval()
    for again in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        assert torch.equal(through(again, x), through(parts, x))
        assert label(again[0]) == label(parts[0])
    meta = [part.to("meta") for part in again]  # zeros that a layer makes are made where its input is
    assert through(meta, x.to("meta")).is_meta


def test_a_pipeline_of_exported_stages_trains_as_the_model_does() -> None:
    model, reference, parts, inputs = make("conv")
    batches = [(inputs(4), torch.randint(5, (4,))) for _ in range(4)]
    loss_fn = nn.functional.cross_entropy
    for network in (model, reference):
        network.drop.p = 0.0  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    with layerpipe.Pipeline(
        parts, loss_fn, lambda params, **past: layerpipe_kernels.SGD(params, lr=0.1, **past), schedule="sequential"
    ) as pipe:
        losses = [pipe.step(*batch) for batch in batches]
        state = pipe.state_dict()
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(reference(x), y)
        loss.backward()
        optimizer.step()
    assert torch.allclose(torch.as_tensor(losses[-1]), loss, rtol=1e-5)
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.allclose(state[k], v, rtol=1e-4, atol=1e-6) for k, v in reference.state_dict().items())


@pytest.mark.parametrize("case", ["gpt", "conv", "branches"])
def test_torchs_own_splitter_computes_the_same_stages_in_training(case: str) -> None:
    """An independent splitter on the same export. It freezes modes and sizes, so it is no substitute."""
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    model, _, parts, inputs = make(case, stages=2)
    at = next(name for name, _ in parts[1].named_parameters()).rpartition(".")[0]
    whole = pipelining.pipeline(model, (inputs(4),), split_spec={at: pipelining.SplitPoint.BEGINNING})
    theirs, x = [whole.get_stage_module(i) for i in range(2)], inputs(4)
    results = []
    for stages in (parts, theirs):
        torch.manual_seed(1)
        results.append(through(stages, x))
    assert torch.equal(*results)


def test_costs_without_memory_and_a_plan() -> None:
    with torch.device("meta"):
        model, tokens = ShapedGPT(layers=4), torch.zeros(2, 6, dtype=torch.long)
    graph = profile(model, (tokens,))
    assert sum(layer.parameters for layer in graph.layers) == sum(p.numel() for p in model.parameters())
    assert [layer.name for layer in graph.layers[:4]] == [
        "tokens", "positions", "blocks.0.ln1", "blocks.0.attention.qkv",
    ]  # fmt: skip
    found = plan(graph, stages=3)
    assert [stage.delay for stage in found.stages] == [4, 2, 0]


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))


class OnValues(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class Counting(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x.shape) if x.shape[0] else 0
        return self.b(self.a(x))


class Rotating(TwoLinears):
    """Angles without gradients and in one precision whatever surrounds them, as rotary embeddings are made."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 4
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            angles = torch.arange(4, device=x.device, dtype=torch.float32) * (
                self.seen.to(device=x.device, dtype=torch.float32) + 1
            )
            sine, cosine = angles.sin(), angles.cos()
        y = self.a(x)
        with torch.no_grad():
            scale = self.b(y).abs().mean(1, keepdim=True)
        with torch.no_grad(), torch.enable_grad():
            y = y * cosine + y.flip(1) * sine
        return self.b(y) / (1 + scale)


class ChangingUnseen(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if x.shape[0] else x
        with torch.no_grad():
            self.seen += 1
        return self.b(y)


class CastingOnMode(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if x.shape[0] else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = nn.functional.dropout(self.b(y), 0.5, self.training)
        return y + z


class ChangingCast(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if x.shape[0] else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y.view(-1).mul_(2)
        return self.b(y)


class OnMode(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.training and x.shape[0]:
            y = y + torch.randn_like(y)
        return self.b(y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OnValues(), r"OnValues cannot be traced \(torch.fx: .*; torch.export: .*data-dependent.*\); give the stages"),
        (Counting(), r"torch.export: its forward changes its buffer seen\); give the stages by hand"),
        (
            ChangingUnseen(),
            r"torch.export: its forward changes b_seen in place where gradients are switched off\); give",
        ),
        (CastingOnMode(), r"torch.export: its code under torch.autocast depends on self.training\); give the stages"),
        (ChangingCast(), r"torch.export: its forward changes linear in place under torch.autocast\); give the stages"),
        (OnMode(), r"torch.export: its code depends on self.training\); give the stages by hand"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_way_out(
    model: nn.Module, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        split(model, 2, (torch.randn(3, 4),))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_without_inputs_the_message_asks_for_them() -> None:
    with pytest.raises(ValueError, match=r"give example_inputs, so that torch\.export can try"):
        split(ShapedBranches(), 2, balance="params")


def test_what_runs_without_gradients_still_does() -> None:
    torch.manual_seed(0)
    model, x = Rotating(), torch.randn(3, 4)
    reference, parts = copy.deepcopy(model), split(model, 2, (torch.randn(2, 4),))
    results = []
    for network, run in ((model, lambda x: through(parts, x)), (reference, reference)):
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    wide = [
        part.double() for part in copy.deepcopy(parts)
    ]  # nothing remembers the dtypes and the device of the example
    assert through(wide, x.double()).dtype is torch.float64
    assert through([part.to("meta") for part in parts], x.to("meta")).is_meta


def test_blocks_that_are_too_few_are_looked_into() -> None:
    """torch.fx takes the inner model as one block, as it would any whose forward it cannot follow."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ShapedGPT()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)  # type: ignore[no-any-return]

    x = torch.randint(11, (4, 6))
    model = Wrapped()
    parts = [part.eval() for part in split(model, 3, (x,))]
    assert torch.equal(through(parts, x), model.eval()(x))
    with pytest.raises(ValueError, match=r"into 2 stages: it has 1 splittable layers \(model\)"):
        split(model, 2, balance="params")


def test_a_dict_as_output_stays_one() -> None:
    class Named(TwoLinears):
        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.a(x) if x.dim() == 2 else x
            return {"y": self.b(y), "more": [y, (x,)]}

    model, x = Named(), torch.randn(3, 4)
    found = through(split(model, 2, (x,)), x)
    assert torch.equal(found["y"], model(x)["y"])
    assert torch.equal(found["more"][1][0], x)


@pytest.mark.parametrize("traced_by", ["fx", "export"])
def test_no_cut_where_a_view_of_what_crosses_is_overwritten(traced_by: str) -> None:
    class Overwriting(TwoLinears):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if traced_by == "export":
                assert y.shape[1] == 4
            z = self.b(y)
            y.view(-1).mul_(2)
            return z.detach() + y

    with pytest.raises(ValueError, match=r"1 splittable layers \(a … b\); no cut before b, .* overwrites a in place"):
        split(Overwriting(), 2, (torch.randn(3, 4),))
