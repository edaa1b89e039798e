"""Costs of a model's layers, found on fake tensors, and their times, measured."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from layerpipe.partition.cuts import Piece, pieces, unique_names
from layerpipe.partition.examples import Examples, in_order
from layerpipe.partition.exported import quietly
from layerpipe.partition.first_layer import without_past
from layerpipe.partition.forward import trace
from layerpipe.partition.layers import Flow, Kept, Layer, LayerGraph
from layerpipe.partition.operations import fake
from layerpipe.partition.split_stage import SplitStage

Tensors = tuple[Any, ...]


@contextmanager
def intraop_threads(count: int) -> Iterator[None]:
    """Measure with so many of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def profile(
    model: nn.Module, example_inputs: Examples | Sequence[Any] | Mapping[str, Any], *, measure: bool = False
) -> LayerGraph:
    """The layers of a model and their costs.

    Everything but time is found with torch's fake tensors, which have shapes and no memory; the model may be on the
    meta device (``with torch.device("meta"): model = ...``).

    Args:
        model: traced, see :func:`layerpipe.partition.forward.trace`.
        example_inputs: arguments of a forward, a tuple or a dict by name; one minibatch.
        measure: also time every layer here, forward and backward, with torch's current intra-op threads.

    Raises:
        ValueError: the model cannot be traced, or a layer's code depends on the values of its inputs.
    """
    examples = example_inputs if isinstance(example_inputs, Examples) else Examples.of(example_inputs)
    assert examples is not None
    forward = trace(model, examples)
    inputs = in_order(forward.nodes, examples.by_name(model))
    parts = pieces(forward)
    units = [SplitStage(forward, [piece]) for piece in parts]
    with forward.fixed.reads.undone():
        return profile_units(parts, units, inputs, measure=measure, no_past=without_past(SplitStage(forward, parts)))


def profile_units(
    parts: list[Piece],
    units: Sequence[nn.Module],
    example_inputs: Sequence[Any],
    *,
    measure: bool,
    no_past: Collection[nn.Parameter] = (),
) -> LayerGraph:
    """:func:`profile` of a model that is in pieces already. A first stage has no past of the weights ``no_past``."""
    measured = seconds([TimedCut(units, example_inputs)])[0] if measure else []
    with FakeTensorMode():
        return _profile(parts, units, pytree.tree_map(fake, tuple(example_inputs)), measured, no_past)


def _profile(
    parts: list[Piece],
    units: Sequence[nn.Module],
    values: Tensors,
    measured: list[tuple[float, float]],
    no_past: Collection[nn.Parameter],
) -> LayerGraph:
    storages = _Storages()
    layers, crossing = [], [_bytes(values)]
    maker: dict[fx.Node, tuple[int, int]] = {}  # a value that crosses -> who made it, its bytes
    flows: dict[tuple[int | None, int], int] = {}
    users: dict[nn.Parameter, int] = {}
    tied = []
    names = unique_names(parts)
    for i, (piece, unit) in enumerate(zip(parts, units, strict=True)):
        storages.layer = i
        layer, values = _run(names[i], unit, values, storages, first=i == 0)
        layers.append(
            dataclasses.replace(
                layer,
                seconds=_split_backward(measured[i], layer) if measured else None,
                no_past=sum(p.nbytes for p in unit.parameters() if p in no_past),
                largest_past=max((p.nbytes for p in unit.parameters() if p not in no_past), default=0),
            )
        )
        tied += [(name, users[p], i) for name, p in unit.named_parameters() if users.setdefault(p, i) != i]
        crossing.append(_bytes(values) if i < len(parts) - 1 else 0)
        for node in {source for n in piece.nodes for source in n.all_input_nodes}:
            if node in maker:
                source, size = maker[node]
                flows[source, i] = flows.get((source, i), 0) + size
        for node, value in zip(piece.outputs, values, strict=False):
            maker.setdefault(node, (i, _bytes((value,))))
    return LayerGraph(layers, [Flow(*key, size) for key, size in flows.items()], crossing, tied, storages.kept)


class _Storages:
    """Counts what is kept for backwards, each storage once; holds them, so that none is taken for another."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Any, int | None]] = {}  # a storage and the last layer to keep it; None: a weight
        self.kept: list[Kept] = []
        self.layer = 0  # the one that runs

    def ignore(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._last[storage._cdata] = storage, None

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        _, before = self._last.get(storage._cdata, (storage, -1))
        if before is not None and before != self.layer:
            self._last[storage._cdata] = storage, self.layer
            self.kept.append(Kept(before, self.layer, storage.nbytes()))

    def first_kept_by(self, layer: int) -> int:
        """Bytes that no layer before has kept."""
        return sum(kept.bytes for kept in self.kept if kept.layer == layer and kept.before < 0)


def _run(name: str, unit: nn.Module, inputs: Tensors, storages: _Storages, *, first: bool) -> tuple[Layer, Tensors]:
    """A layer's costs and its outputs."""
    inputs = tuple(_like(x, requires_grad=not first) for x in inputs)
    params = {key: fake(p).requires_grad_() for key, p in unit.named_parameters()}
    state = {**params, **{key: fake(b) for key, b in unit.named_buffers()}}
    for param in params.values():
        storages.ignore(param)

    def pack(tensor: Tensor) -> Tensor:
        storages.add(tensor)
        return tensor

    try:
        with (
            quietly(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            FlopCounterMode(display=False) as forward,
            _elements_of_layers(unit) as within,
        ):
            result = torch.func.functional_call(unit, state, inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        backward = _backward_flops(outputs, tensors)
        both = _backward_flops(outputs, [*tensors, *params.values()])
    except Exception as error:  # whatever the model's own code raises without data
        shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
        raise ValueError(
            f"{name} cannot be run without data on {shapes} ({(str(error) or repr(error)).splitlines()[0]}): do the "
            "example inputs fit? layerpipe.split does not run it with balance='params' or at=..., and takes stages "
            "that are made by hand"
        ) from error
    made = [y for y in outputs if isinstance(y, Tensor) and not any(y is x for x in inputs)]
    layer = Layer(
        name=name,
        parameters=sum(p.numel() for p in params.values()),
        weights=sum(p.nbytes for p in params.values()),
        largest=max((p.nbytes for p in params.values()), default=0),
        forward_flops=float(forward.get_total_flops()),
        backward_flops=backward,
        gradient_flops=both - backward,
        elements=max(sum(y.numel() for y in made), sum(within)),
        input_bytes=_bytes(inputs),
        output_bytes=_bytes(tuple(made)),
        saved=storages.first_kept_by(storages.layer),
    )
    return layer, outputs


@contextmanager
def _elements_of_layers(unit: nn.Module) -> Iterator[list[int]]:
    """Collects how many numbers each layer with parameters puts out inside a unit: a block kept whole has several."""
    elements: list[int] = []
    layers = [m for m in unit.modules() if next(m.parameters(recurse=False), None) is not None]

    def count(_: nn.Module, __: Any, output: Any) -> None:
        elements.append(sum(y.numel() for y in pytree.tree_leaves(output) if isinstance(y, Tensor)))

    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield elements
    finally:
        for handle in handles:
            handle.remove()


def _backward_flops(outputs: Tensors, wanted: list[Tensor]) -> float:
    starts = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad and y.grad_fn is not None]
    if not wanted or not starts:
        return 0.0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(starts, wanted, [torch.empty_like(y) for y in starts], retain_graph=True, allow_unused=True)
    return float(counter.get_total_flops())


class TimedCut:
    """Stages of one cut, ready to be timed: each with its buffers and what the one before puts out."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        example_inputs: Sequence[Any],
        wrap: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        """With ``wrap``, of copies, run as ``wrap(stage)``, which alone change; without, buffers stay as they are."""
        if wrap is not None:
            stages = [wrap(copy.deepcopy(stage)) for stage in stages]
        self.runs = list[tuple[nn.Module, dict[str, Tensor], Tensors]]()
        values = tuple(example_inputs)
        with _random_numbers_kept(stages):
            for i, stage in enumerate(stages):
                buffers = {} if wrap is not None else {name: b.clone() for name, b in stage.named_buffers()}
                self.runs.append((stage, buffers, tuple(_like(x, requires_grad=i > 0) for x in values)))
                with torch.no_grad():
                    result = torch.func.functional_call(stage, buffers, values)
                values = result if isinstance(result, tuple) else (result,)


def seconds(timed: Sequence[TimedCut], *, at_least: float = 0.0) -> list[list[tuple[float, float]]]:
    """Of each stage's forward and of its backward, for every cut. No random numbers are used up.

    All stages of all cuts take turns: none finds its weights still in a cache, as in training. What each takes is
    the median of its shares of a turn, so that a machine whose speed drifts from turn to turn measures the same, in
    seconds of the fastest turn.

    Args:
        timed: cuts, which may share stages.
        at_least: seconds to go on for, per cut; but no more than 30 turns.
    """
    turns: list[list[list[tuple[float, float]]]] = []
    with _random_numbers_kept([stage for cut in timed for stage, _, _ in cut.runs]):
        began = time.perf_counter()
        while len(turns) < 8 or (len(turns) < 30 and time.perf_counter() - began < at_least * len(timed)):
            turns.append([[_seconds(*run) for run in cut.runs] for cut in timed])
            if len(turns) == 1:
                began = time.perf_counter()
    times = np.array([[t for takes in turn for both in takes for t in both] for turn in turns])
    times = times[1:]  # the first also builds and tunes kernels
    totals = times.sum(axis=1, keepdims=True)
    each = iter((np.median(times / totals, axis=0) * totals.min()).tolist())
    return [[(next(each), next(each)) for _ in cut.runs] for cut in timed]


@contextmanager
def _random_numbers_kept(units: Iterable[nn.Module]) -> Iterator[None]:
    devices = {p.device for unit in units for p in unit.parameters() if p.device.type != "cpu"}
    with torch.random.fork_rng(list(devices), device_type=next(iter(devices)).type if devices else "cuda"):
        yield


def _seconds(unit: nn.Module, buffers: dict[str, Tensor], inputs: Tensors) -> tuple[float, float]:
    """Of one forward and its backward."""
    params = list(unit.parameters())
    wanted = [x for x in (*inputs, *params) if isinstance(x, Tensor) and x.requires_grad]
    devices = {x.device for x in (*inputs, *params, *buffers.values()) if isinstance(x, Tensor)}
    start = _now(devices)
    out = torch.func.functional_call(unit, buffers, inputs)
    middle = _now(devices)
    outputs = [y for y in pytree.tree_leaves(out) if isinstance(y, Tensor) and y.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)
    return middle - start, _now(devices) - middle


def _now(devices: Iterable[torch.device]) -> float:
    """Once these have done all that they were given; calls of all but a CPU return before that."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def _split_backward(measured: tuple[float, float], layer: Layer) -> tuple[float, float, float]:
    """A measured backward is one run of both gradients: shared out by their FLOPs."""
    both = layer.backward_flops + layer.gradient_flops
    share = layer.backward_flops / both if both else 1.0
    return measured[0], measured[1] * share, measured[1] * (1 - share)


def _tensors(values: Tensors) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves(values) if isinstance(x, Tensor))


def _bytes(values: Tensors) -> int:
    return sum(x.nbytes for x in _tensors(values))


def _like(x: Any, *, requires_grad: bool) -> Any:
    """The same memory without its history."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().requires_grad_(requires_grad and (x.is_floating_point() or x.is_complex()))
