"""Weights that a stage's computation meets and that its optimizer does not train.

Another stage's weight would get its gradient in the middle of that stage's own ticks, at whatever age it is then; a
weight of nobody's would get one that nobody uses. The leaves of autograd's graph show both. It is walked for the first
minibatch after the pipe was empty, for the second, fourth, eighth ..., and for the loss whenever it ends in other
operations than the last time.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from layerpipe.stage.copies import depth_first


class Owners:
    """Maps parameters to the stages that own them. Keeps none of them alive: other processes' are let go of.

    Args:
        stages: of the whole pipeline.
        names: what messages call them.
    """

    def __init__(self, stages: Sequence[nn.Module], names: Sequence[str]) -> None:
        self._names: Any = WeakIdKeyDictionary()
        for i, stage in enumerate(stages):
            for name, param in stage.named_parameters():
                self._names[param] = i, f"{name} of {names[i]}"

    def of(self, param: Tensor) -> tuple[int, str] | None:
        """A parameter's stage, and what messages call the parameter; ``None`` if no stage has it."""
        found: tuple[int, str] | None = self._names.get(param)
        return found

    def memory(self, stage: int) -> list[tuple[int, int, str]]:
        """Return where the trained weights of other stages begin and end in memory, in this order, and their names."""
        return sorted(
            (param.data_ptr(), param.data_ptr() + param.nbytes, name)
            for param, (owner, name) in self._names.items()
            if owner != stage and param.requires_grad and param.is_leaf and param.numel()
        )


def check_held(stage: str, module: nn.Module, optimizer: Any, owners: Owners, *, last: bool) -> None:
    """Refuse an optimizer with parameters that are not its stage's; the last stage's may have those of the loss.

    Raises:
        ValueError: it holds another stage's, or some that no stage has.
    """
    own = set(module.parameters())
    for param in (p for group in optimizer.param_groups for p in group["params"] if p not in own):
        owner = owners.of(param)
        if owner is not None or not last:
            what = owner[1] if owner is not None else f"a parameter of shape {tuple(param.shape)} of no stage"
            raise ValueError(
                f"{stage}: the optimizer holds {what}; give it the parameters that the function is called with. Those "
                "of the loss belong to loss_params="
            )


class ForeignWeights:
    """The search of one stage.

    Args:
        index: the stage's.
        name: what messages call it.
        module: its layers.
        trained: parameters that its optimizer holds.
        owners: of all stages' parameters.
    """

    def __init__(
        self, index: int, name: str, module: nn.Module, trained: Iterable[nn.Parameter], owners: Owners | None
    ) -> None:
        self._index, self._name, self._module, self._owners = index, name, module, owners
        self._trained = set(trained)
        self._frozen = [p for p in module.parameters() if p not in self._trained]
        self._seen: Any = WeakIdKeyDictionary()  # leaves that are no parameters, and may be of one minibatch only
        self.restart()

    def restart(self) -> None:
        """Look again at the next minibatch."""
        self._forwards = 0
        self._loss: tuple[Any, ...] = ()

    def due(self) -> bool:
        """Count a minibatch's forward; returns whether :meth:`check_forward` has something to look at."""
        self._forwards += 1
        return bool(self._frozen) or self._forwards & (self._forwards - 1) == 0

    def check_forward(self, outputs: Sequence[Tensor], inputs: Sequence[Any], saved: Iterable[int] | None) -> None:
        """Look at a minibatch's forward.

        Args:
            outputs: of the stage.
            inputs: of the stage, which are leaves of the graph.
            saved: addresses of what autograd keeps for the backward, where they are known.

        Raises:
            RuntimeError: it uses a weight that the stage's optimizer does not train.
        """
        for param in self._frozen:
            if param.requires_grad:
                self._refuse_late(param)
        if self._forwards & (self._forwards - 1) == 0:
            self._check("its forward", outputs, inputs, _AS_OUTPUT)
            self._check_memory(saved or ())

    def check_loss(self, loss: Tensor, inputs: Sequence[Any]) -> None:
        """As :meth:`check_forward`, at the minibatch's loss."""
        ends = _ends(loss)
        if ends != self._loss or self._forwards & (self._forwards - 1) == 0:
            self._loss = ends
            self._check("loss_fn", [loss], inputs, _AS_PENALTY)

    def _check(self, where: str, outputs: Sequence[Tensor], inputs: Sequence[Any], remedy: str) -> None:
        given = {id(x) for x in inputs}
        for leaf in _leaves(outputs):
            if leaf in self._trained or id(leaf) in given:
                continue
            if any(leaf is param for param in self._module.parameters()):
                self._refuse_late(leaf)
            owner = self._owners.of(leaf) if self._owners is not None else None
            if owner is not None:
                raise RuntimeError(f"{where} uses {owner[1]}, which only that stage trains; {remedy}")
            if isinstance(leaf, nn.Parameter) or leaf in self._seen:
                raise RuntimeError(
                    f"{where} uses a weight of shape {tuple(leaf.shape)} that no stage trains; {_UNKNOWN[where]}"
                )
            self._seen[leaf] = True

    def _check_memory(self, saved: Iterable[int]) -> None:
        spans = self._owners.memory(self._index) if self._owners is not None else []
        starts = [start for start, _, _ in spans]
        for address in saved:
            at = bisect.bisect_right(starts, address) - 1
            if at >= 0 and address < spans[at][1]:
                raise RuntimeError(f"it reads {spans[at][2]}, which changes in other ticks; {_AS_OUTPUT}")

    def _refuse_late(self, param: Tensor) -> None:
        name = next((name for name, p in self._module.named_parameters() if p is param), "a parameter")
        raise RuntimeError(
            f"{name} requires a gradient, and the optimizer does not hold it: it was frozen or not there when the "
            "pipeline was made. Make the pipeline with all parameters that are ever trained, and call "
            "requires_grad_(False) on some afterwards; or make a new pipeline"
        )


_AS_OUTPUT = "hand it on from that stage as a further output, or put both uses of it in one stage"
_AS_PENALTY = (
    "compute a penalty or an auxiliary loss in that stage's own forward and hand it on to loss_fn as a further output; "
    "the optimizers' weight_decay is one, too"
)
_UNKNOWN: dict[str, str] = {
    "its forward": "let it be a parameter of the stage's module when the pipeline is made",
    "loss_fn": "give it to layerpipe.Pipeline in loss_params=, or freeze it with requires_grad_(False)",
}


def _leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of a graph that require gradients."""
    roots = []
    for y in outputs:
        if y.grad_fn is not None:
            roots.append(y.grad_fn)
        elif y.requires_grad:
            yield y
    for node in depth_first(roots):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf


def _ends(loss: Tensor) -> tuple[Any, ...]:
    """The last operations of a loss, by which one that has begun to add something is known."""
    node = loss.grad_fn
    return () if node is None else (type(node), *[type(before) for before, _ in node.next_functions])
