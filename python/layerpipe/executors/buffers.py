"""Tensors that stay where they are while their values change: what a graph reads, and what it lends to a neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from layerpipe.executors.channels import Lent, sent
from layerpipe_kernels.layout import distinct, fill, room_like


class Buffers:
    """Tensors that stay where they are, for what is different in every minibatch.

    Args:
        name: what messages call it.
        example: a tensor, or a tuple, list or dict of them.
    """

    def __init__(self, name: str, example: Any) -> None:
        self.name = name
        leaves, self._tree = pytree.tree_flatten(example)
        self._leaves = [_room(x) if isinstance(x, Tensor) else x for x in leaves]

    @property
    def content(self) -> Any:
        return pytree.tree_unflatten(self._leaves, self._tree)

    def fill(self, item: Any, stream: Any) -> None:
        """Copy a minibatch's tensors, on this stream; lent ones may then be overwritten.

        Raises:
            ValueError: other shapes, dtypes or values beside tensors.
        """
        leaves, tree = pytree.tree_flatten(plain(item))
        if tree != self._tree or not all(map(_takes, self._leaves, leaves)):
            raise ValueError(
                f"the {self.name} have been captured as {_kinds(self._leaves)} and are now {_kinds(leaves)}; "
                "executor='graphs' needs the same in every minibatch (drop_last=True, .contiguous()?), "
                "executor='streams' does not"
            )
        for mine, theirs in zip(self._leaves, leaves, strict=True):
            if isinstance(mine, Tensor):
                fill(mine, theirs)
        if isinstance(item, Lent):
            item.was_read(stream)

    def copied(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Copies of tensors like these, in their place; ``None`` where there is none."""
        pairs = zip(self._leaves, tensors, strict=True)
        return tuple([None if theirs is None else fill(mine, theirs) for mine, theirs in pairs])


def plain(item: Any) -> Any:
    """A tuple of the tensors that a neighbour lends, else the item itself."""
    return tuple(item) if isinstance(item, Lent) else item


def owned(item: Any, stream: Any) -> Any:
    """Copies of what is lent, made on this stream, else the item itself."""
    if not isinstance(item, Lent):
        return item
    copies = tuple([sent(x) if isinstance(x, Tensor) else x for x in item])
    item.was_read(stream)
    return copies


def _room(example: Tensor) -> Tensor:
    room = room_like(example)
    distinct(room).zero_()
    return room


def _takes(mine: Any, theirs: Any) -> bool:
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return not isinstance(mine, Tensor) and not isinstance(theirs, Tensor) and bool(mine == theirs)
    repeats = zip(distinct(mine).shape, distinct(theirs).shape, strict=False)
    return (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype) and all(m >= t for m, t in repeats)


def _kinds(values: Sequence[Any]) -> str:
    return f"({', '.join(map(_shown, values))})"


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    once = tuple(distinct(value).shape)
    return f"{tuple(value.shape)} {value.dtype}" + (f" expanded from {once}" if once != value.shape else "")
