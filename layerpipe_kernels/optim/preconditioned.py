"""What SOAP and Muon share: matrices in stacks of one shape, Adam for everything else, one update for both."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from layerpipe_kernels import layout, reference
from layerpipe_kernels.optim import stacks
from layerpipe_kernels.optim.arguments import Group, require_finite
from layerpipe_kernels.optim.averaging import AveragingOptimizer
from layerpipe_kernels.optim.capture import refuse_capture
from layerpipe_kernels.optim.checkpoint import HISTORY_KEYS
from layerpipe_kernels.optim.matrices import is_preconditioned
from layerpipe_kernels.optim.stacks import Scratch, Stack

State = dict[str, Any]


class AdamNumbers(NamedTuple):
    """Adam's hyperparameters for a list of directions, and what they are multiplied with."""

    beta1: float
    beta2: float
    eps: float
    scale: float = 1.0


class _Parts(NamedTuple):
    """A group's parameters with a gradient, by how they are stepped; indices are places among them."""

    moving: list[Tensor]
    options: tuple[Any, ...]
    matrices: list[list[int]]  # of one shape each
    others: list[int]
    places: list[float]  # of every parameter among the matrices, in [0, 1)
    stacks: list[Stack | None]  # of ``matrices``; made in the first step that needs them
    rooms: list[Tensor]  # of every parameter's direction, in its order in memory


class PreconditionedOptimizer(AveragingOptimizer):
    """An optimizer whose step is a direction ``d`` per parameter: ``u = lr d + lr wd W``, ``W -= u``.

    Matrices have theirs from a preconditioner of the subclass, other parameters from Adam. Everything is computed in
    float32 (float64 for such weights), and so is the state.
    """

    #: What of a group decides how its parameters are stepped.
    _parted_by: tuple[str, ...] = ("precondition",)

    @abstractmethod
    def _adam(self, group: Group) -> AdamNumbers:
        """Of parameters that are not preconditioned."""

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

    #: Names of a matrix's state that no other parameter has.
    _matrix_state: tuple[str, ...] = ()

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._parts_of: dict[int, _Parts] = {}
        self._scratch = Scratch()

    @_disable_dynamo  # its scalars are new in every step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, and with them what their past is made of.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.

        Raises:
            TypeError: a sparse gradient.
            ValueError: an option that is not finite, or a gradient that no preconditioner can begin with.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            require_finite(group, ("lr", "eps", "weight_decay"))
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._check_gradient(group, i, param.grad)
        for index, group in enumerate(self.param_groups):
            self._before_step(group)
            made = iter(self._update(index, group))
            self._after_step(group, [None if p.grad is None else next(made) for p in group["params"]])
        return loss

    @torch.no_grad()
    def _update(self, index: int, group: Group) -> Sequence[Tensor]:
        """Step the parameters with gradients, and return their updates ``u``."""
        parts = self._parts(index, group)
        if not parts.moving:
            return []
        directions = self._directions(group, parts)
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        updates = torch._foreach_mul(directions, lr)
        weights = [p.detach().to(d.dtype) for p, d in zip(parts.moving, directions, strict=True)]
        if decay:
            torch._foreach_add_(updates, weights, alpha=lr * decay)
        torch._foreach_sub_(weights, updates)
        torch._foreach_copy_([p.detach() for p in parts.moving], weights)
        torch.autograd.graph.increment_version(parts.moving)
        return list(updates)

    def _directions(self, group: Group, parts: _Parts) -> list[Tensor]:
        """Of every parameter with a gradient, ``(*)`` in its order in memory."""
        grads = [p.grad for p in parts.moving if p.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if parts.others:
            params = [parts.moving[i] for i in parts.others]
            states = [self._adam_state(p) for p in params]
            rooms = [parts.rooms[i] for i in parts.others]
            torch._foreach_copy_(rooms, [grads[i] for i in parts.others])
            average, square, count = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            adam_directions(rooms, average, square, count, self._adam(group))
        for place, indices in enumerate(parts.matrices):
            stack = self._stack_of(group, parts, place)
            shape = len(indices), stack.rows, stack.cols
            room = self._scratch("gradients", parts.rooms[indices[0]], *shape)
            out = self._scratch("directions", room, *shape)
            places = [parts.places[i] for i in indices]
            self._direct(group, stack, stack.gather([grads[i] for i in indices], room), out, places)
            rooms = [parts.rooms[i] for i in indices]
            torch._foreach_copy_(rooms, [d.view(r.shape) for d, r in zip(out.unbind(0), rooms, strict=True)])
        return parts.rooms

    def _stack_of(self, group: Group, parts: _Parts, place: int) -> Stack:
        params = [parts.moving[i] for i in parts.matrices[place]]
        states = [self.state[p] for p in params]
        stack = parts.stacks[place]
        if stack is None or not stack.fits(params, states):
            stack = parts.stacks[place] = self._stack(group, params, states)
        return stack

    def _parts(self, index: int, group: Group) -> _Parts:
        params = group["params"]
        moving = [p for p in params if p.grad is not None]
        options = tuple(map(group.get, self._parted_by))
        parts = self._parts_of.get(index)
        if parts is not None and parts.options == options and len(parts.moving) == len(moving):
            same = all(map(operator.is_, parts.moving, moving))
            if same and all(map(layout.follows, parts.rooms, moving)):
                return parts
        matrix = [self._is_matrix(group, i) for i, p in enumerate(params) if p.grad is not None]
        chosen = [i for i, yes in enumerate(matrix) if yes]
        matrices = [[chosen[i] for i in part] for part in stacks.split([moving[i] for i in chosen])]
        parts = self._parts_of[index] = _Parts(
            moving,
            options,
            matrices,
            [i for i, yes in enumerate(matrix) if not yes],
            [sum(matrix[:i]) / max(1, len(chosen)) for i in range(len(moving))],
            [None] * len(matrices),
            [torch.empty_like(p, dtype=reference.state_dtype(p.dtype), requires_grad=False) for p in moving],
        )
        return parts

    def _refuse_capture(self, device: torch.device, group: Group) -> None:
        if device.type == "cuda":
            refuse_capture(f"a step of {type(self).__name__} cannot be captured in a CUDA graph")

    def _check_gradient(self, group: Group, i: int, grad: Tensor) -> None:
        """Refuse what cannot be stepped with, before anything is written."""
        if grad.layout != torch.strided:
            raise TypeError(f"the gradient of {self.name(group, i)} is {grad.layout}; only dense ones are supported")

    def _aligned_state(self, param: Tensor) -> State:
        state: State = self.state[param]
        if not any(name in state for name in self._matrix_state):
            return super()._aligned_state(param)
        # A matrix's own state lies in a stack, whatever the parameter's order in memory.
        past = {name: state[name] for name in (*HISTORY_KEYS, "master") if name in state}
        layout.align(past, param)
        state.update(past)
        return state

    def _adam_state(self, param: Tensor) -> State:
        state = self._aligned_state(param)
        full = reference.state_dtype(param.dtype)
        began = [name for name in self._matrix_state if state.pop(name, None) is not None]
        if began or "step" not in state or state["exp_avg"].shape != param.shape:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(param, dtype=full, requires_grad=False)
        return state


def adam_directions(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: list[Tensor],
    numbers: AdamNumbers,
) -> None:
    """``d = mhat / (sqrt(qhat) + eps)`` in the gradients' place; ``m``, ``q`` and the counts are updated."""
    beta1, beta2, eps, scale = numbers
    torch._foreach_add_(counts, 1.0)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    roots = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(roots, [(1 - beta2**count).sqrt().to(q) for count, q in zip(counts, roots, strict=True)])
    torch._foreach_add_(roots, eps)
    torch._foreach_copy_(grads, exp_avgs)
    torch._foreach_div_(grads, roots)
    torch._foreach_mul_(grads, [(scale / (1 - beta1**count)).to(g) for count, g in zip(counts, grads, strict=True)])
