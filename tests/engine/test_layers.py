from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerpipe import split
from layerpipe.models.gpt import GPT
from layerpipe.partition.profile import profile
from layerpipe.theory.retiming import Node, derive, registers


class Branches(nn.Module):
    """Two branches that start and end together, with a skip connection past both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.deeper, self.join = nn.Linear(8, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        left, right = self.left(y), self.deeper(torch.relu(self.right(y)))
        return self.join(torch.cat([left, right], 1)) + y


class UNet(nn.Module):
    """Skip connections inside each other: five tensors cross its middle."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = torch.tanh(layer(x))
            kept.append(x)
        for layer in self.up:
            x = torch.tanh(layer(x)) + kept.pop()
        return x


def through(parts: list[nn.Module], *values: Tensor) -> Tensor:
    for part in parts:
        out = part(*values)
        values = out if isinstance(out, tuple) else (out,)
    return values[0]


@pytest.mark.parametrize("balance", ["params", "flops", "bytes"])
@pytest.mark.parametrize("model", [Branches(), UNet()], ids=["branches", "unet"])
def test_branches_and_nested_skips_are_carried_across_cuts(model: nn.Module, balance: str) -> None:
    x = torch.randn(3, 8 if isinstance(model, Branches) else 6)
    most = 5 if isinstance(model, Branches) else 8
    for stages in range(1, most + 1):
        assert torch.equal(through(split(model, stages, (x,), balance=balance), x), model(x))


def test_arithmetic_and_bytes_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    first, second = profile(model, (torch.randn(7, 10),)).layers
    assert (first.parameters, first.weights, first.largest) == (220, 880, 800)
    assert (second.forward_flops, second.backward_flops, second.gradient_flops) == (2 * 7 * 20 * 5,) * 3
    assert first.backward_flops == 0  # nobody wants the gradient of the data
    assert (first.input_bytes, first.output_bytes) == (4 * 7 * 10, 4 * 7 * 20)
    assert (first.no_past, second.no_past) == (first.weights, 0)  # a weight enters only its input's gradient
    # Kept: the input and the ReLU's output; the second layer's input is that same tensor.
    assert (first.saved, second.saved) == (4 * 7 * 30, 0)


def test_what_is_saved_is_what_autograd_saves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(2, 3, 8, 8)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.requires_grad
    assert sum(layer.saved for layer in profile(model, (x,)).layers) == sum(kept.values())


def test_published_sizes() -> None:
    """Parameters as in torchvision's documentation; multiplications and additions of the forward counted as two."""
    models = pytest.importorskip("torchvision").models
    for name, parameters, macs in (("vgg16", 138357544, 15.47e9), ("resnet50", 25557032, 4.09e9)):
        with torch.device("meta"):
            layers = profile(getattr(models, name)(), (torch.zeros(1, 3, 224, 224),)).layers
        assert sum(layer.parameters for layer in layers) == parameters
        assert sum(layer.forward_flops for layer in layers) == pytest.approx(2 * macs, rel=0.01)


def test_a_resnet_gets_registers_on_its_skips() -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        found = profile(models.resnet18(), (torch.zeros(1, 3, 64, 64),))
    graph = found.graph()
    names = list(graph)
    at = [names.index(name) for name in ("layer1.0.conv2", "layer1.1.conv1", "layer3.0.bn2")]
    grouping = [names[a:b] for a, b in zip([0, *at], [*at, len(names)], strict=True)]
    derivation = derive(graph, grouping)
    assert derivation.delays == [6, 4, 2, 0]
    # bn1 gives the first block's input, which its last addition wants again.
    assert registers(derivation.graph, Node("F", "bn1"), Node("F", "layer1.0.bn2")) == 1
    assert registers(derivation.graph, Node("F", "bn1"), Node("F", "layer1.0.conv1")) == 0


def test_gpt_is_causal_and_has_the_published_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(tied=True).parameters()) == 124439808
    torch.manual_seed(0)
    model = GPT(layers=2, width=16, heads=2, context=8, vocabulary=11)
    tokens = torch.randint(11, (3, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    a, b = model(tokens), model(changed)
    assert a.shape == (3, 8, 11)
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    assert torch.equal(through(split(model, 6, (tokens,)), tokens), a)
    with pytest.raises(ValueError, match="width=10"):
        GPT(width=10, heads=3)


def test_measured_times_come_with_each_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = profile(model, (torch.randn(4, 8),), measure=True).layers
    assert all(layer.seconds is not None and min(layer.seconds) >= 0 and sum(layer.seconds) > 0 for layer in layers)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_cuts_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    parts = split(model, 2, at=["3"])
    assert [sorted(n for n, _ in p.named_parameters()) for p in parts] == [
        ["0.bias", "0.weight", "1.bias", "1.weight"],
        ["3.bias", "3.weight"],
    ]
    for at, message in (
        (["2"], "cannot cut before 2: 2 overwrites _1 in place"),
        (["0"], "the first stage begins with it"),
        (["9"], "the forward calls no such layer"),
        (["3", "1"], "follow the forward's order"),
    ):
        with pytest.raises(ValueError, match=message):
            split(model, len(at) + 1, at=at)
    with pytest.raises(ValueError, match="2 stages have 1 cuts"):
        split(model, 2, at=["1", "3"])


def test_code_that_depends_on_values_is_refused_with_a_way_out() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.abs().max())

    class Model(nn.Sequential):
        pass

    with pytest.raises(ValueError, match=r"cannot be traced|without data"):
        profile(Model(Scaled(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),))
