"""The places where a traced forward can be cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from layerpipe.partition.forward import Forward
from layerpipe.partition.values import derivable, is_constant, is_tensor, overwritten


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


def pieces(forward: Forward) -> list[Piece]:
    """The finest legal cut of a model, each piece led by something that has parameters."""
    work, crossing, _ = _cuts(forward)
    starts = [0, *crossing]
    # A piece without parameters belongs to the one before; what comes before the first parameters, to those.
    ends = [*starts[1:], len(work)]
    kept = [a for a, b in zip(starts, ends, strict=True) if _has_parameters(forward.root, work[a:b])]
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


def find_cuts(forward: Forward, parts: list[Piece], names: Sequence[str]) -> list[int]:
    """Return the pieces that these layers begin.

    Raises:
        ValueError: no cut is possible before one of them; the message says why.
    """
    starts = {name: i for i, name in enumerate(unique_names(parts))}
    cuts = []
    for name in names:
        if not starts.get(name):
            reason = "the first stage begins with it" if name in starts else _why_not(forward, name)
            raise ValueError(f"cannot cut before {name}: {reason}")
        cuts.append(starts[name])
    if cuts != sorted(set(cuts)):
        raise ValueError(f"the layers to cut before must follow the forward's order, each once; got {', '.join(names)}")
    return cuts


def uncuttable(forward: Forward) -> dict[str, str]:
    """Layers with parameters before which there is no cut, and why."""
    work, _, reasons = _cuts(forward)
    return {str(work[i].target): reason for i, reason in reasons.items()
            if work[i].op == "call_module" and _has_parameters(forward.root, [work[i]])}  # fmt: skip


def _why_not(forward: Forward, name: str) -> str:
    work, _, reasons = _cuts(forward)
    at = next((i for i, node in enumerate(work) if node.op == "call_module" and node.target == name), None)
    if at is None:
        return "the forward calls no such layer"
    return reasons.get(at, "there are no parameters from there to the next cut, or none before it")


def _cuts(forward: Forward) -> tuple[list[fx.Node], dict[int, list[fx.Node]], dict[int, str]]:
    """Return what is computed, the values that cross before each node where a cut is legal, and elsewhere why it is
    not."""
    model = forward.root
    work = [node for node in forward.nodes if not is_constant(node)]
    position = {node: i for i, node in enumerate(work)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in work}
    overwriter: dict[fx.Node, fx.Node] = {}
    for node in work:
        overwriter.update(dict.fromkeys(overwritten(model, node), node))
    crossing: dict[int, list[fx.Node]] = {}
    reasons: dict[int, str] = {}
    alive: list[fx.Node] = []
    for i, node in enumerate(work[1:], start=1):  # a cut before this node
        alive = [n for n in (*alive, work[i - 1]) if last_use[n] >= i]
        if node.op in ("placeholder", "output") or not alive:
            continue
        changed = [n for n in alive if n in overwriter and position[overwriter[n]] >= i]
        tensors = [n for n in alive if is_tensor(model, n)]
        others = [n for n in alive if n not in tensors and not derivable(n, tensors)]
        if changed:
            by = overwriter[changed[0]]
            reasons[i] = (
                f"{by.target} overwrites {changed[0].name} in place, which belongs to the stage before; use the "
                "out-of-place form, or cut elsewhere"
            )
        elif others:
            reasons[i] = f"{others[0].name}, which is not one tensor, is needed on both sides"
        elif tensors:
            crossing[i] = tensors
    return work, crossing, reasons


def _has_parameters(model: nn.Module, nodes: list[fx.Node]) -> bool:
    return any(
        next(model.get_submodule(str(n.target)).parameters(), None) is not None for n in nodes if n.op == "call_module"
    ) or any(source.op == "get_attr" and isinstance(_attribute(model, source), nn.Parameter)
             for n in nodes for source in n.all_input_nodes)  # fmt: skip


def _attribute(model: nn.Module, node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(model.get_submodule(path), name)
