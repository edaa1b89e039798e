"""A model cut into stages."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

BALANCES = ("flops", "time", "params")


class _Tracer(fx.Tracer):
    """Looks into the model and its nn.Sequential parts, and takes every other module as one layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential)


def split(
    model: nn.Module,
    stages: int,
    example_inputs: Sequence[Any] | None = None,
    *,
    balance: str = "flops",
) -> list[nn.Module]:
    """Cut a model into a chain of stages of equal cost that share its layers and keep its parameter names.

    The model's ``forward`` is traced (:mod:`torch.fx`) down to its layers and the blocks of its ``nn.Sequential``
    parts, and cut where exactly one tensor passes: an ``nn.Sequential``, a ResNet, or any other chain of blocks.

    Args:
        model: shared with the stages, not copied.
        stages: how many.
        example_inputs: arguments of a forward, needed to balance by ``flops`` or ``time``.
        balance: ``"flops"`` (of the forward, the same on every machine), ``"time"`` (forward and backward, measured
            here) or ``"params"``.

    Raises:
        ValueError: the model cannot be traced, or has fewer places to cut than stages are wanted; the message says
            what to do. Stages made by hand, a list of modules, need no ``split``.
    """
    if stages < 1:
        raise ValueError(f"a pipeline has at least one stage, got {stages}")
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r} is unknown; there are: {', '.join(BALANCES)}")
    if balance != "params" and example_inputs is None:
        raise ValueError(f"balance={balance!r} runs the model: give example_inputs, or use balance='params'")
    pieces = _pieces(model)
    units = [SplitStage(model, piece) for piece in pieces]
    if stages > len(units):
        raise ValueError(
            f"cannot split {type(model).__name__} into {stages} stages: it has {len(units)} splittable layers "
            f"({', '.join(label(u) for u in units)})"
        )
    if balance == "params":
        costs = [float(sum(p.numel() for p in u.parameters())) for u in units]
    else:
        assert example_inputs is not None
        costs = _measure(units, example_inputs, _flops if balance == "flops" else _seconds)
    cuts = _balanced(costs, stages)
    parts: list[nn.Module] = [
        SplitStage(model, [node for piece in pieces[a:b] for node in piece]) for a, b in itertools.pairwise(cuts)
    ]
    _refuse_tied(parts)
    return parts


class SplitStage(fx.GraphModule):
    """Consecutive nodes of a traced model as a module of its own, with the model's own parameter names."""

    def __init__(self, model: nn.Module, nodes: list[fx.Node]) -> None:
        graph, values = fx.Graph(), {}
        inside = set(nodes)
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in inside and source not in values:
                    if source.op == "get_attr":
                        values[source] = graph.node_copy(source)
                    else:
                        values[source] = graph.placeholder(source.name)
            values[node] = graph.node_copy(node, lambda n: values[n])
        if nodes[-1].op != "output":
            graph.output(values[nodes[-1]])
        super().__init__(model, graph, class_name="Stage")


def label(stage: nn.Module) -> str:
    """What a stage holds, for people: its first and last layer."""
    names = [n.target for n in stage.graph.nodes if n.op == "call_module"] if isinstance(stage, SplitStage) else []
    if not names:
        return type(stage).__name__
    return str(names[0]) if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _pieces(model: nn.Module) -> list[list[fx.Node]]:
    """The finest legal cut of the model, each piece but the first led by something that has parameters."""
    by_hand = "give the stages by hand, as a list of modules"
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception as error:  # whatever the model's own code raises under tracing
        raise ValueError(f"{type(model).__name__} cannot be traced ({error}); {by_hand}") from error
    work = [n for n in nodes if n.op != "get_attr"]
    position = {n: i for i, n in enumerate(work)}
    last_use = {n: max((position[u] for u in n.users), default=-1) for n in work}
    pieces: list[list[fx.Node]] = [[]]
    for i, node in enumerate(work):
        pieces[-1].append(node)
        alive = [n for n in work[: i + 1] if last_use[n] > i]
        following = work[i + 1] if i + 1 < len(work) else None
        if (
            alive == [node]
            and node.op != "placeholder"
            and following is not None
            and following.op != "output"
            and not _in_place(model, following)
        ):
            pieces.append([])
    units: list[list[fx.Node]] = []
    for piece in pieces:
        if units and not _has_parameters(model, piece):
            units[-1] += piece
        else:
            units.append(piece)
    if len(units) > 1 and not _has_parameters(model, units[0]):
        units[:2] = [units[0] + units[1]]
    return units


def _refuse_tied(stages: list[nn.Module]) -> None:
    owner: dict[nn.Parameter, int] = {}
    for i, stage in enumerate(stages):
        for name, param in stage.named_parameters():
            if owner.setdefault(param, i) != i:
                raise ValueError(
                    f"{name} of shape {tuple(param.shape)} is used in stage {owner[param]} and in stage {i}; tied "
                    "weights cannot be split. Give the stages by hand, with both uses in one of them"
                )


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node would overwrite its input, which at a boundary belongs to the stage before."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def _has_parameters(model: nn.Module, nodes: list[fx.Node]) -> bool:
    return any(
        next(model.get_submodule(str(n.target)).parameters(), None) is not None
        for n in nodes
        if n.op == "call_module"
    ) or any(source.op == "get_attr" for n in nodes for source in n.all_input_nodes)


def _measure(
    units: list[SplitStage], example_inputs: Sequence[Any], cost: Callable[[nn.Module, tuple[Any, ...]], float]
) -> list[float]:
    """Each unit's cost on what the unit before it puts out. On copies: no running statistics change."""
    costs, values = [], tuple(example_inputs)
    for unit in units:
        private = copy.deepcopy(unit)
        costs.append(cost(private, values))
        with torch.no_grad():
            result = private(*values)
        values = result if isinstance(result, tuple) else (result,)
    return costs


def _flops(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = module(*inputs)
    # Elementwise layers count nothing; their output stands for the little they cost.
    return float(counter.get_total_flops()) + (out.numel() if isinstance(out, Tensor) else 0)


def _seconds(module: nn.Module, inputs: tuple[Any, ...], repeats: int = 5) -> float:
    inputs = tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = module(*inputs)
        if out.requires_grad:
            out.backward(torch.ones_like(out))
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def _balanced(costs: list[float], parts: int) -> list[int]:
    """Cuts ``0 = c_0 < ... < c_parts = len(costs)`` whose most expensive part is cheapest (exact)."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    count = len(costs)
    best = {(0, 0): (0.0, 0)}  # (parts, layers) -> (most expensive part, its first layer)
    for p in range(1, parts + 1):
        for end in range(p, count - (parts - p) + 1):
            best[p, end] = min(
                (max(best[p - 1, start][0], total[end] - total[start]), start)
                for start in range(p - 1, end)
                if (p - 1, start) in best
            )
    cuts = [count]
    for p in range(parts, 0, -1):
        cuts.append(best[p, cuts[-1]][1])
    return cuts[::-1]
