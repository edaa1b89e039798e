"""A model cut into stages."""

from __future__ import annotations

import copy
import itertools
import operator
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

BALANCES = ("flops", "time", "params")
#: Tensors that may pass a stage boundary: a layer's output and one skip connection.
MOST_CROSSING = 2
#: What writing an activation costs beside arithmetic, as seen on one core with ResNet-18's layers.
FLOPS_PER_ELEMENT = 200
_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.ipow)


class _Blocks(fx.Tracer):
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

    The model's ``forward`` is traced (:mod:`torch.fx`) down to torch's own layers, or, where a block's code does not
    allow that, down to the blocks of its ``nn.Sequential`` parts. It is cut between layers where at most two tensors
    pass: in a chain of layers anywhere, in a residual block with the skip connection carried along.

    Args:
        model: shared with the stages, not copied.
        stages: how many.
        example_inputs: arguments of a forward, needed to balance by ``flops`` or ``time``.
        balance: ``"flops"`` (of the forward, activations counted in as memory traffic; the same on every machine),
            ``"time"`` (forward and backward, measured here with the threads that a stage's worker will have) or
            ``"params"``.

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
    units = [SplitStage(model, [piece]) for piece in pieces]
    if stages > len(units):
        raise ValueError(
            f"cannot split {type(model).__name__} into {stages} stages: it has {len(units)} splittable layers "
            f"({', '.join(label(u) for u in units)})"
        )
    if balance == "params":
        costs = [float(sum(p.numel() for p in u.parameters())) for u in units]
    else:
        assert example_inputs is not None
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // stages))
        try:
            costs = _measure(units, example_inputs, _flops if balance == "flops" else _seconds)
        finally:
            torch.set_num_threads(threads)
    cuts = _balanced(costs, stages)
    parts: list[nn.Module] = [SplitStage(model, pieces[a:b]) for a, b in itertools.pairwise(cuts)]
    refuse_shared(parts)
    _warn_of_unused(model, parts)
    return parts


def _warn_of_unused(model: nn.Module, stages: list[nn.Module]) -> None:
    used = {name for stage in stages for name, _ in stage.named_parameters()}
    unused = [name for name, _ in model.named_parameters() if name not in used]
    if unused:
        warnings.warn(
            f"{', '.join(unused)}: not used in the forward, so in no stage and not in the pipeline's state_dict",
            stacklevel=3,
        )


class _Piece(NamedTuple):
    """Consecutive nodes of a traced model, and the values that cross its ends."""

    inputs: list[fx.Node]
    nodes: list[fx.Node]
    outputs: list[fx.Node]


class SplitStage(fx.GraphModule):
    """Consecutive pieces of a traced model as a module of its own, with the model's own parameter names."""

    def __init__(self, model: nn.Module, pieces: list[_Piece]) -> None:
        graph = fx.Graph()
        values = {node: graph.placeholder(node.name) for node in pieces[0].inputs}
        nodes = [node for piece in pieces for node in piece.nodes]
        for node in nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in values:
                    values[source] = graph.node_copy(source)
            values[node] = graph.node_copy(node, lambda n: values[n])
        if nodes[-1].op != "output":
            passed = [values[node] for node in pieces[-1].outputs]
            graph.output(passed[0] if len(passed) == 1 else tuple(passed))
        super().__init__(model, graph, class_name="Stage")
        self.is_split = True  # outlives pickling, which makes it a plain GraphModule


def is_split(stage: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether :func:`split` made this stage, so that its parameters have the model's names."""
    return isinstance(stage, fx.GraphModule) and getattr(stage, "is_split", False)


def label(stage: nn.Module) -> str:
    """What a stage holds, for people: its first and last layer."""
    names = [n.target for n in stage.graph.nodes if n.op == "call_module"] if is_split(stage) else []
    if not names:
        return type(stage).__name__
    return str(names[0]) if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _pieces(model: nn.Module) -> list[_Piece]:
    """The finest legal cut of the model, each piece led by something that has parameters."""
    work = [node for node in _trace(model) if node.op != "get_attr"]
    position = {node: i for i, node in enumerate(work)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in work}
    starts = [0]
    crossing: dict[int, list[fx.Node]] = {0: []}
    for i, node in enumerate(work[:-1], start=1):  # a cut before work[i]
        alive = [n for n in work[:i] if last_use[n] >= i]
        if node.op == "placeholder" or work[i].op in ("placeholder", "output") or not 1 <= len(alive) <= MOST_CROSSING:
            continue
        if all(_is_tensor(model, n) for n in alive) and not any(_overwrites(model, n, alive) for n in work[i:]):
            starts.append(i)
            crossing[i] = alive
    # A piece without parameters belongs to the one before; what comes before the first parameters, to those.
    ends = [*starts[1:], len(work)]
    kept = [a for a, b in zip(starts, ends, strict=True) if _has_parameters(model, work[a:b])]
    kept = [0, *kept[1:]]
    crossing[len(work)] = []
    return [_Piece(crossing[a], work[a:b], crossing[b]) for a, b in itertools.pairwise([*kept, len(work)])]


def _trace(model: nn.Module) -> list[fx.Node]:
    """As deep as the model's code allows.

    A trace holds the branch that ``self.training`` chose; where the two modes differ, it goes less deep.

    Raises:
        ValueError: not at all.
    """
    training = {module: module.training for module in model.modules()}
    reason: Exception = ValueError("its code depends on self.training")
    try:
        for tracer in (fx.Tracer, _Blocks):
            try:
                model.eval()
                evaluated = list(tracer().trace(model).nodes)
                model.train()
                trained = list(tracer().trace(model).nodes)
            except Exception as error:  # whatever the model's own code raises under tracing
                reason = error
                continue
            if list(map(_spelled, evaluated)) == list(map(_spelled, trained)):
                return trained
    finally:
        for module, mode in training.items():
            module.training = mode
    raise ValueError(
        f"{type(model).__name__} cannot be traced ({reason}); give the stages by hand, as a list of modules"
    ) from reason


def _spelled(node: fx.Node) -> tuple[str, ...]:
    return node.op, node.name, str(node.target), str(node.args), str(node.kwargs)


def _is_tensor(model: nn.Module, node: fx.Node) -> bool:
    """Whether a value is one tensor, as far as its making shows; sizes and tuples cannot cross a boundary."""
    if node.op == "call_module":
        return not isinstance(model.get_submodule(str(node.target)), nn.RNNBase | nn.MultiheadAttention)
    if node.op == "placeholder":
        return True
    if node.op == "call_method":
        return node.target not in ("size", "dim", "numel", "chunk", "split", "unbind")
    if node.target in (getattr, operator.getitem) or getattr(node.target, "__name__", "") in (
        "chunk",
        "split",
        "unbind",
    ):
        return False
    return any(_is_tensor(model, source) or source.op == "get_attr" for source in node.all_input_nodes)


def refuse_shared(stages: Sequence[nn.Module]) -> None:
    """Tied weights must be in one stage.

    Raises:
        ValueError: a parameter is in two.
    """
    owner: dict[nn.Parameter, int] = {}
    for i, stage in enumerate(stages):
        for name, param in stage.named_parameters():
            if owner.setdefault(param, i) != i:
                raise ValueError(
                    f"{name} of shape {tuple(param.shape)} is in stage {owner[param]} and in stage {i}; tied weights "
                    "cannot be split. Give the stages by hand, with both uses in one of them"
                )


def _overwrites(model: nn.Module, node: fx.Node, values: list[fx.Node]) -> bool:
    """Whether a node changes one of these values in place; at a boundary they belong to the stage before."""
    if not node.all_input_nodes or node.all_input_nodes[0] not in values:
        return False
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        bool(node.kwargs.get("inplace"))
        or (name.endswith("_") and not name.endswith("__"))
        or getattr(operator, name, None) in _IN_PLACE_OPERATORS
    )


def _has_parameters(model: nn.Module, nodes: list[fx.Node]) -> bool:
    return any(
        next(model.get_submodule(str(n.target)).parameters(), None) is not None for n in nodes if n.op == "call_module"
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
    made = [y for y in (out if isinstance(out, tuple) else (out,)) if not any(y is x for x in inputs)]
    return float(counter.get_total_flops() + FLOPS_PER_ELEMENT * sum(y.numel() for y in made))


def _seconds(module: nn.Module, inputs: tuple[Any, ...], repeats: int = 8) -> float:
    """The least of several forwards and backwards: what else the machine does can only add."""
    inputs = tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = module(*inputs)
        outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one also builds and tunes kernels


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
