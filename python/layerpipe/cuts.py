"""A model's forward as a list of layers, and the places where it can be cut."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx, nn

_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.ipow)


class Piece(NamedTuple):
    """Consecutive nodes of a traced model, and the values that cross its ends."""

    inputs: list[fx.Node]
    nodes: list[fx.Node]
    outputs: list[fx.Node]

    @property
    def name(self) -> str:
        """Its first layer, or the parameter that it begins with."""
        for node in self.nodes:
            for named in (node, *node.all_input_nodes):
                if named.op == ("call_module" if named is node else "get_attr"):
                    return str(named.target)
        return self.nodes[0].name


class SplitStage(fx.GraphModule):
    """Consecutive pieces of a traced model as a module of its own, with the model's own parameter names."""

    def __init__(self, model: nn.Module, pieces: list[Piece]) -> None:
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


def pieces(model: nn.Module) -> list[Piece]:
    """The finest legal cut of the model, each piece led by something that has parameters.

    Raises:
        ValueError: the model cannot be traced.
    """
    work, crossing, _ = _cuts(model)
    starts = [0, *crossing]
    # A piece without parameters belongs to the one before; what comes before the first parameters, to those.
    ends = [*starts[1:], len(work)]
    kept = [a for a, b in zip(starts, ends, strict=True) if _has_parameters(model, work[a:b])]
    kept = [0, *kept[1:]]
    crossing = {0: [], **crossing, len(work): []}
    return [Piece(crossing[a], work[a:b], crossing[b]) for a, b in itertools.pairwise([*kept, len(work)])]


def unique_names(parts: Sequence[Piece]) -> list[str]:
    """Each piece's name; the second use of a layer is ``name#2``."""
    seen: dict[str, int] = {}
    names = []
    for piece in parts:
        seen[piece.name] = count = seen.get(piece.name, 0) + 1
        names.append(piece.name if count == 1 else f"{piece.name}#{count}")
    return names


def find_cuts(model: nn.Module, parts: list[Piece], names: Sequence[str]) -> list[int]:
    """Which pieces these layers begin.

    Raises:
        ValueError: no cut is possible before one of them; the message says why.
    """
    starts = {name: i for i, name in enumerate(unique_names(parts))}
    cuts = []
    for name in names:
        if not starts.get(name):
            reason = "the first stage begins with it" if name in starts else _why_not(model, name)
            raise ValueError(f"cannot cut before {name}: {reason}")
        cuts.append(starts[name])
    if cuts != sorted(set(cuts)):
        raise ValueError(f"the layers to cut before must follow the forward's order, each once; got {', '.join(names)}")
    return cuts


def _why_not(model: nn.Module, name: str) -> str:
    work, _, reasons = _cuts(model)
    at = next((i for i, node in enumerate(work) if node.op == "call_module" and node.target == name), None)
    if at is None:
        return "the forward calls no such layer"
    return reasons.get(at, "there are no parameters from there to the next cut, or none before it")


def _cuts(model: nn.Module) -> tuple[list[fx.Node], dict[int, list[fx.Node]], dict[int, str]]:
    """A traced forward, the values that cross before each node where a cut is legal, and elsewhere why it is not."""
    work = [node for node in _trace(model) if node.op != "get_attr"]
    position = {node: i for i, node in enumerate(work)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in work}
    overwriter = {target: node for node in work if (target := _overwrites(model, node)) is not None}
    crossing: dict[int, list[fx.Node]] = {}
    reasons: dict[int, str] = {}
    alive: list[fx.Node] = []
    for i, node in enumerate(work[1:], start=1):  # a cut before this node
        alive = [n for n in (*alive, work[i - 1]) if last_use[n] >= i]
        if node.op in ("placeholder", "output") or not alive:
            continue
        changed = [n for n in alive if n in overwriter and position[overwriter[n]] >= i]
        others = [n for n in alive if not _is_tensor(model, n)]
        if changed:
            by = overwriter[changed[0]]
            reasons[i] = (
                f"{by.target} overwrites {changed[0].name} in place, which belongs to the stage before; use the "
                "out-of-place form, or cut elsewhere"
            )
        elif others:
            reasons[i] = f"{others[0].name}, which is not one tensor, is needed on both sides"
        else:
            crossing[i] = alive
    return work, crossing, reasons


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


def _overwrites(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The value that a node changes in place."""
    if not node.all_input_nodes:
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        in_place = bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    else:
        in_place = (
            bool(node.kwargs.get("inplace"))
            or (name.endswith("_") and not name.endswith("__"))
            or getattr(operator, name, None) in _IN_PLACE_OPERATORS
        )
    return node.all_input_nodes[0] if in_place else None


def _has_parameters(model: nn.Module, nodes: list[fx.Node]) -> bool:
    return any(
        next(model.get_submodule(str(n.target)).parameters(), None) is not None for n in nodes if n.op == "call_module"
    ) or any(source.op == "get_attr" for n in nodes for source in n.all_input_nodes)


class _Blocks(fx.Tracer):
    """Looks into the model and its nn.Sequential parts, and takes every other module as one layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential)
