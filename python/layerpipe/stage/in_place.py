"""Past weights in the weights' own memory, for backwards that do not only unpack what a forward saved.

Python runs in a backward, too: :func:`torch.utils.checkpoint.checkpoint` calls layers once more, a function of one's
own reads the weight that it kept as ``ctx.weight``, a hook multiplies by one. All of them take what is in the
parameter, so that has to be the past, until the backward is over. Who reads a parameter from Python is seen when it
happens; what a forward saved under hooks of its own, or under none, is not, and then all weights are put back to what
they were, and so are buffers and modes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from layerpipe.stage.saved import SavedTensors

_set_versions: Any = torch._C._autograd._unsafe_set_version_counter
_push: Any = torch._C._push_on_torch_function_stack
_pop: Any = torch._C._pop_torch_function_stack

#: Of a tensor's properties, those whose value depends on its memory.
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}
_NO_WRITES = {"requires_grad_", "retain_grad_", "share_memory_", "rename_"}


class AsLeft:
    """A stage's weights' versions, its buffers and its modes, as a forward has left them."""

    def __init__(self, module: nn.Module, params: Sequence[Tensor]) -> None:
        self.versions = [p._version for p in params]
        self.modes = [(m, m.training) for m in module.modules()]
        self.buffers = [
            (m._buffers, name, buffer, buffer.detach().clone(), buffer._version)
            for m, _ in self.modes
            for name, buffer in m._buffers.items()
            if buffer is not None
        ]


class PastInPlace(TorchFunctionMode):
    """One stage's.

    Args:
        module: the stage's layers.
        params: its trained weights.
        saved: what autograd keeps of its forwards, and where past weights come from.
    """

    def __init__(self, module: nn.Module, params: Sequence[Tensor], saved: SavedTensors) -> None:
        super().__init__()
        self.used = False  # whether any backward has needed it
        self.scratch_bytes = 0  # of the past weights and of copies of the present ones, at most
        self.before: Callable[[], None] | None = None  # called once in a backward that runs Python, before that does
        self.fixed: set[Any] = set()  # weights that have no past, since nothing was to read it
        self.buffers: list[Tensor] = []  # of the stage: what a backward must not read once a later forward has written
        self._module, self._params, self._saved = module, params, saved
        self._now: dict[Tensor, tuple[Tensor, int]] = {}  # the present values of what is in place, and its version
        self._left: AsLeft | None = None
        self._later: AsLeft | None = None
        self._told = False
        self._versions: Sequence[int] = ()  # of the buffers, behind the forward
        self._overwritten: dict[int, Tensor] = {}  # by address: buffers that have been written to since

    def begin(self, left: AsLeft | None, buffers: Sequence[int] = ()) -> None:
        """Before a backward.

        Args:
            left: where its forward has saved what its stage's hooks have not seen.
            buffers: the versions of :attr:`buffers` behind its forward, where they are known.
        """
        self._saved.hands_past = True
        self._versions = buffers
        if left is None:
            self._saved.watched = True
            _push(self)
            return
        self._tell()
        self._left, self._later = left, AsLeft(self._module, self._params)
        for param in self._params:
            self._put(param)
        self._restore(left)

    def end(self) -> None:
        """After it, also where it failed.

        Raises:
            RuntimeError: something in the backward has changed a weight.
        """
        self._saved.hands_past = False
        if self._left is None:
            _pop()
            self._saved.watched = False
            if not self._told:
                return
        self._told = False
        written = None
        expected = dict(zip(self._params, self._left.versions, strict=True)) if self._left is not None else {}
        for param, (now, version) in self._now.items():
            if param._version != expected.get(param, version):
                written = param
            param.data.copy_(now)
        self._now.clear()
        self._saved.in_place.clear()
        if self._later is not None:
            self._restore(self._later)
            self._left = self._later = None
        if written is not None:
            raise self._changed(written)

    def _restore(self, left: AsLeft) -> None:
        for module, training in left.modes:
            module.training = training
        buffers = []
        for buffers_of, name, buffer, values, version in left.buffers:
            buffers_of[name] = buffer
            if buffer.shape == values.shape:
                buffer.data.copy_(values)
            else:
                buffer.data = values
            buffers.append((buffer, version))
        tensors = [*self._params, *(buffer for buffer, _ in buffers)]
        if tensors:
            _set_versions(tensors, [*left.versions, *(version for _, version in buffers)])

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._saved.find_weights()
            self._overwritten = {
                buffer.untyped_storage().data_ptr(): buffer
                for buffer, version in zip(self.buffers, self._versions, strict=False)
                if buffer._version != version and buffer.layout == torch.strided
            }
            if self.before is not None:
                self.before()

    def _put(self, param: Tensor) -> None:
        """Put a weight's past in its place, once in a backward."""
        if param in self._now or not param.requires_grad:
            return
        assert self._saved.past_view is not None
        past = self._saved.past_view(param)
        self.used = True
        if param in self.fixed:
            raise RuntimeError(
                f"a backward reads {self._name(param)}, a weight of the network's first layer that no backward was to "
                "read, so that it has no past; put that layer into a module of your own, whose past weights are kept"
            )
        if past.data_ptr() != param.data_ptr():  # else the latest serve as the past
            self._now[param] = param.detach().clone(), param._version
            self._saved.in_place[param] = past
            param.data.copy_(past)
            self.scratch_bytes = max(self.scratch_bytes, sum(2 * p.nbytes for p in self._now))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._tell()
        if not _is_property(func):
            weights = [w for value in (args, *kwargs.values()) for w in self._weights(value)]
            if weights and (written := self._written(func, args, kwargs)):
                raise self._changed(written[0])
            for weight in weights:
                self._put(weight)
            if self._overwritten:
                self._check_buffers(func, args, kwargs)
        return func(*args, **kwargs)

    def _check_buffers(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse to read a buffer that another minibatch has written to since the forward.

        Batch normalization in training writes to its buffers and does not read them, and so does what writes in place.
        """
        if _name_of(func) == "batch_norm" and len(args) > 5 and args[5]:
            return
        read = args[1:] if _writes(func) else args
        for tensor in pytree.tree_leaves((read, kwargs)):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            buffer = self._overwritten.get(tensor.untyped_storage().data_ptr())
            if buffer is not None:
                name = next((name for name, b in self._module.named_buffers() if b is buffer), "of the stage")
                raise RuntimeError(
                    f"a backward reads the buffer {name}, which a later minibatch's forward has written to: hand it to "
                    "the backward by ctx.save_for_backward, or as a clone"
                )

    def _weights(self, value: Any) -> list[Tensor]:
        """The trained weights in whose memory tensors lie."""
        if isinstance(value, Tensor):
            owner = self._saved.owner(value)
            return [owner] if owner is not None and owner.requires_grad else []
        if isinstance(value, tuple | list):
            return [weight for item in value for weight in self._weights(item)]
        if isinstance(value, dict):
            return self._weights(tuple(value.values()))
        return []

    def _written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        return [*(self._weights(args[:1]) if _writes(func) else ()), *self._weights(kwargs.get("out"))]

    def _changed(self, param: Tensor) -> RuntimeError:
        return RuntimeError(
            f"something changes the weight {self._name(param)} in a backward (a hook that steps an optimizer?), which "
            "has its past values then; weights are changed by the stage's optimizer only"
        )

    def _name(self, param: Tensor) -> str:
        return next((name for name, p in self._module.named_parameters() if p is param), "of the stage")


_OPERATORS = {"__init__", "__invert__", "__index__", "__int__", "__iter__"}  # that write nothing, unlike __iadd__


def _name_of(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def _writes(func: Any) -> bool:
    """Return whether a function writes to its first argument."""
    name = _name_of(func)
    if name.endswith("_") and not name.endswith("__"):
        return name not in _NO_WRITES
    return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _OPERATORS)


def _is_property(func: Any) -> bool:
    """Return whether a function only looks at what kind of tensor it is given, or at its gradient."""
    name = _name_of(func)
    return name in ("__get__", "__set__") and getattr(func.__self__, "__name__", "data") not in _VALUES
