"""The base of SOAP and Muon: matrices in stacks of one shape, Adam for everything else, one update for both."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels import layout, reference
from layerpipe_kernels.optim import stacks
from layerpipe_kernels.optim.checkpoint import HISTORY_KEYS, PREDICTION_KEYS
from layerpipe_kernels.optim.directions import AdamArrays, AdamDirections
from layerpipe_kernels.optim.fused import FusedOptimizer
from layerpipe_kernels.optim.matrices import is_preconditioned, sides
from layerpipe_kernels.optim.options import Group, learning_rate, refuse_capture, require_finite
from layerpipe_kernels.optim.stacks import Scratch, Stack
from layerpipe_kernels.options import AdamOptions, DirectionOptions

State = dict[str, Any]

_ADAM = ("exp_avg", "exp_avg_sq", "step")


class _Parts(NamedTuple):
    """A group's parameters with a gradient, by how they are stepped; indices are places among them."""

    with_grad: list[Tensor]
    options: tuple[Any, ...]
    matrices: list[list[int]]  # of one shape each
    others: list[int]
    places: list[float]  # of every parameter among the matrices, in [0, 1)
    outs: list[Tensor]  # of each of ``matrices``: its directions, (k, rows, cols)
    directions: list[Tensor]  # of every parameter, in its order in memory: part of ``outs`` where that can be
    stacks: dict[int, Stack]  # of ``matrices``; made in the first step that needs them


class PreconditionedOptimizer(FusedOptimizer):
    """An optimizer whose step is a direction ``d`` per parameter: ``u = lr d + lr wd W``, ``W -= u``.

    Matrices have theirs from a preconditioner of the subclass, other parameters from Adam. Everything is computed in
    float32 (float64 for such weights), and so is the state.
    """

    rule = "direction"
    collects = False

    #: What of a group decides how its parameters are stepped.
    _parted_by: tuple[str, ...] = ("precondition",)
    #: Names in a matrix's state that no other parameter's has.
    _matrix_marks: tuple[str, ...] = ()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A :class:`torch.amp.GradScaler` unscales the gradients and skips an update that overflowed, on the host."""
        return False

    @abstractmethod
    def _adam(self, group: Group) -> AdamOptions:
        """Returns Adam's options for parameters that are not preconditioned; ``lr`` multiplies their direction."""

    @abstractmethod
    def _stack(self, group: Group, params: list[Tensor], states: list[State]) -> Stack:
        """Make the state of matrices of one shape."""

    @abstractmethod
    def _direct(self, group: Group, stack: Stack, grads: Tensor, out: Tensor, places: Sequence[float]) -> None:
        """Write the directions of a stack.

        Args:
            grads: ``(k, rows, cols)``, not to be written.
            out: ``(k, rows, cols)``.
            places: of each among the group's matrices, in ``[0, 1)``: work that need not be done in every step is
                spread by it.
        """

    def _is_matrix(self, group: Group, i: int) -> bool:
        return is_preconditioned(group, i)

    def _check_gradient(self, group: Group, i: int, grad: Tensor) -> None:
        """Refuse what cannot be stepped with, before anything is written."""
        if grad.layout != torch.strided:
            raise TypeError(f"the gradient of {self.name(group, i)} is {grad.layout}; only dense ones are supported")

    def _options(self, group: Group) -> DirectionOptions:
        require_finite(group, ("lr", "eps", "weight_decay"))
        return DirectionOptions(learning_rate(group), float(group["weight_decay"]))

    def _states(self, group: Group) -> tuple[str, ...]:
        return ()

    def _counts(self, group: Group, on_device: bool) -> bool:
        return False

    def _keeps_state(self, group: Group) -> bool:
        return True

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._parts_of: dict[int, _Parts] = {}
        self._adam_of: dict[int, AdamDirections] = {}
        self._scratch = Scratch()

    def _grad_dtype(self, param: Tensor) -> torch.dtype:
        return reference.state_dtype(param.dtype)

    def _refuse_capture(self, device: torch.device) -> None:
        """Refuse a CUDA graph: the host decides which bases a step refreshes."""
        if device.type == "cuda":
            refuse_capture(f"a step of {type(self).__name__} cannot be captured in a CUDA graph")

    def _find_arrays(self, index: int, group: Group, on_device: bool) -> Any:
        if group["params"]:
            self._refuse_capture(group["params"][0].device)
        for i, param in enumerate(group["params"]):
            if param.grad is not None:
                self._check_gradient(group, i, param.grad)
        return super()._find_arrays(index, group, on_device)

    def _grads(self, ready: Any, with_grad: Sequence[Tensor]) -> Sequence[Tensor]:
        return [p.grad.resolve_neg() for p in with_grad if p.grad is not None]

    def _step_group(
        self, index: int, group: Group, options: Any, found: Any, scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if found.ready is not None:
            found = found._replace(grads=self._directions(index, group, found.ready.with_grad, found.grads))
        super()._step_group(index, group, options, found, scale, found_inf)

    @torch.no_grad()
    def _directions(
        self, index: int, group: Group, with_grad: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Returns the direction of every parameter with a gradient, ``(*)`` in its order in memory."""
        parts = self._parts(index, group, with_grad)
        if group["maximize"]:
            grads = torch._foreach_neg(list(grads))
        if parts.others:
            self._direct_others(index, group, parts, [grads[i] for i in parts.others])
        for place, indices in enumerate(parts.matrices):
            stack, out = self._stack_of(group, parts, place), parts.outs[place]
            gathered = self._scratch("gradients", out, *out.shape)
            places = [parts.places[i] for i in indices]
            self._direct(group, stack, stacks.gather([grads[i] for i in indices], gathered), out, places)
            for i, direction in zip(indices, out.unbind(0), strict=True):
                if parts.directions[i].data_ptr() != direction.data_ptr():
                    parts.directions[i].copy_(direction.view(parts.directions[i].shape))
        return parts.directions

    def _direct_others(self, index: int, group: Group, parts: _Parts, grads: list[Tensor]) -> None:
        states = [self._adam_state(parts.with_grad[i]) for i in parts.others]
        directions = [parts.directions[i] for i in parts.others]
        arrays = AdamArrays(*([state[name] for state in states] for name in _ADAM))
        made = self._adam_of.get(index)
        if made is None or not made.fits(directions, arrays, group["backend"]):
            names = self._names(group, parts, parts.others)
            made = self._adam_of[index] = AdamDirections(directions, arrays, names, group["backend"])
        made.write([g.to(r.dtype) for g, r in zip(grads, directions, strict=True)], self._adam(group))

    def _names(self, group: Group, parts: _Parts, indices: Sequence[int]) -> list[str]:
        places = {p: i for i, p in enumerate(group["params"])}
        return [self.name(group, places[parts.with_grad[i]]) for i in indices]

    def _stack_of(self, group: Group, parts: _Parts, place: int) -> Stack:
        params = [parts.with_grad[i] for i in parts.matrices[place]]
        states = [self.state[p] for p in params]
        stack = parts.stacks.get(place)
        if stack is None or not stack.fits(states):
            stack = parts.stacks[place] = self._stack(group, params, states)
        return stack

    def _parts(self, index: int, group: Group, with_grad: Sequence[Tensor]) -> _Parts:
        options = tuple(map(group.get, self._parted_by))
        parts = self._parts_of.get(index)
        if parts is not None and parts.options == options and len(parts.with_grad) == len(with_grad):
            same = all(map(operator.is_, parts.with_grad, with_grad))
            if same and all(map(layout.follows, parts.directions, with_grad)):
                return parts
        places = {p: i for i, p in enumerate(group["params"])}
        matrix = [self._is_matrix(group, places[p]) for p in with_grad]
        chosen = [i for i, yes in enumerate(matrix) if yes]
        matrices = [[chosen[i] for i in part] for part in stacks.split([with_grad[i] for i in chosen])]
        directions = dict[int, Tensor]()
        outs = []
        for indices in matrices:
            first = with_grad[indices[0]]
            out = torch.empty(
                len(indices), *sides(first), dtype=reference.state_dtype(first.dtype), device=first.device
            )
            outs.append(out)
            for i, direction in zip(indices, out.unbind(0), strict=True):
                if with_grad[i].is_contiguous():
                    directions[i] = direction.view(with_grad[i].shape)
        for i, param in enumerate(with_grad):
            if i not in directions:
                directions[i] = torch.empty_like(param, dtype=reference.state_dtype(param.dtype), requires_grad=False)
        parts = self._parts_of[index] = _Parts(
            list(with_grad),
            options,
            matrices,
            [i for i, yes in enumerate(matrix) if not yes],
            [sum(matrix[:i]) / max(1, len(chosen)) for i in range(len(with_grad))],
            outs,
            [directions[i] for i in range(len(with_grad))],
            {},
        )
        return parts

    def _adam_state(self, param: Tensor) -> State:
        state = self._aligned_state(param)
        began = [name for name in self._matrix_marks if state.pop(name, None) is not None]
        if began or "step" not in state or state["exp_avg"].shape != param.shape:
            full = reference.state_dtype(param.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(param, dtype=full, requires_grad=False)
        elif state["step"].device != param.device:  # torch's optimizers keep it on the CPU
            state["step"] = state["step"].to(param.device)
        return state

    def _aligned_state(self, param: Tensor) -> State:
        state: State = self.state[param]
        if not any(name in state for name in self._matrix_marks):
            return super()._aligned_state(param)
        # A matrix's own state lies in a stack, whatever the parameter's order in memory.
        past = {name: state[name] for name in (*HISTORY_KEYS, *PREDICTION_KEYS, "master") if name in state}
        layout.align(past, param)
        state.update(past)
        return state
