"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, with a memory of its past weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerpipe_kernels import reference
from layerpipe_kernels.optim.directions import AdamArrays, AdamDirections
from layerpipe_kernels.optim.matrices import sides
from layerpipe_kernels.optim.options import Group, PastOptions, check_adam_group, past_options
from layerpipe_kernels.optim.preconditioned import PreconditionedOptimizer, State
from layerpipe_kernels.optim.prediction import beta1_of, newest_share
from layerpipe_kernels.optim.stacks import Array, Stack
from layerpipe_kernels.options import AdamOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

_GRAMS, _BASES = ("gram_left", "gram_right"), ("basis_left", "basis_right")
#: From where on turning the longer side, too, costs as much as a small minibatch's forward and backward.
_LONG = 512
_ADAM = ("exp_avg", "exp_avg_sq", "step")


class SOAP(PreconditionedOptimizer):
    """SOAP (Vyas et al., arXiv 2409.11321): Adam in a slowly turning basis, for all of a network's parameters.

    Of a gradient ``G (r, c)``: ``L <- b L + (1 - b) G G^T``, ``R <- b R + (1 - b) G^T G``; Adam's averages are of
    ``Q_L^T G Q_R``, and the direction is turned back, ``d = Q_L (mhat / (sqrt(qhat) + eps)) Q_R^T``. Every
    ``precondition_frequency`` steps a basis is refreshed by a power iteration, ``Q <- qr(L Q)``, and ``m`` is turned
    into the new one; ``q`` stays. Then ``W -= lr d + lr wd W``.

    As in the authors' code, the first gradient of a matrix only begins its preconditioner: ``L = (1 - b) G G^T``, and
    ``Q`` its eigenvectors; the first direction is zero. The refreshes of different matrices are spread over the period,
    one after the other, so that no step is much longer than the others. Columns are not sorted again.

    Matrices, and convolutions as ``(out, in * k * k)``, are preconditioned. Embeddings, output layers, vectors, and
    matrices with a side of 1 step with Adam, with the same options; see
    :func:`layerpipe_kernels.mark_embeddings_and_output`.

    Args:
        params: parameters, named parameters, or dicts of groups. Names say which are embeddings and output layers.
        lr, betas, eps, weight_decay: as in :class:`torch.optim.AdamW`; the defaults are SOAP's.
        beta1_delay: as in :class:`layerpipe_kernels.Adam`.
        shampoo_beta: ``b``; ``betas[1]`` where it is negative.
        precondition_frequency: steps from one refresh of a basis to the next.
        max_precond_dim: longer sides are not turned.
        one_sided: turn the shorter side alone, or both; ``None`` turns both where neither is longer than 512.
        precondition: ``True`` for a group whose matrices are all preconditioned, ``False`` for one of which none is;
            ``None`` decides for each by its mark and its name.
        state_dtype: of the matrices ``L``, ``R`` and ``Q``: ``torch.bfloat16`` halves their bytes, and products with
            them are then made of bfloat16 factors; the parameter's own, at least float32, by default.
        maximize: as in torch.
        options: ``delay``, ``past``, ``spike_compensation``, ``weight_prediction``, ``master_weights`` and ``backend``,
            as in :class:`layerpipe_kernels.AdamW`.

    Raises:
        ValueError: an option out of its range, or options that contradict each other.
    """

    _matrix_marks = (*_GRAMS, *_BASES, "refresh_in")
    _parted_by = ("precondition", "max_precond_dim", "one_sided", "state_dtype", "precondition_frequency")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        one_sided: bool | None = None,
        precondition: bool | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        beta1_delay: float = 0.0,
        **options: Unpack[PastOptions],
    ) -> None:
        defaults = {
            **past_options("SOAP", options),
            "lr": lr,
            "betas": betas,
            "beta1_delay": beta1_delay,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "one_sided": one_sided,
            "precondition": precondition,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "capturable": False,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        check_adam_group(group)
        if not group["shampoo_beta"] < 1.0:
            raise ValueError(f"shampoo_beta must be below 1, got {group['shampoo_beta']}")
        for name in ("precondition_frequency", "max_precond_dim"):
            if isinstance(group[name], bool) or not isinstance(group[name], int) or group[name] < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {group[name]!r}")
        if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got {group['state_dtype']}")
        super()._check_group(group)

    def _check_gradient(self, group: Group, i: int, grad: Tensor) -> None:
        super()._check_gradient(group, i, grad)
        state = self.state.get(group["params"][i])
        if not state and self._is_matrix(group, i) and not bool(grad.isfinite().all()):
            raise ValueError(
                f"the first gradient of {self.name(group, i)} is not finite; no preconditioner can begin with it"
            )

    def _is_matrix(self, group: Group, i: int) -> bool:
        return super()._is_matrix(group, i) and any(_turned(group, *sides(group["params"][i])))

    def _adam(self, group: Group) -> AdamOptions:
        beta1, beta2 = beta1_of(group), float(group["betas"][1])
        return AdamOptions(1.0, beta1, beta2, float(group["eps"]), newest_share=newest_share(group, beta1))

    def _stack(self, group: Group, params: list[Tensor], states: list[State]) -> Stack:
        rows, cols = sides(params[0])
        full = reference.state_dtype(params[0].dtype)
        dtype = group["state_dtype"] or full
        arrays = {"step": Array((), torch.float32)}
        arrays |= dict.fromkeys(("exp_avg", "exp_avg_sq"), Array((rows, cols), full))
        for gram, basis, turned, n in zip(_GRAMS, _BASES, _turned(group, rows, cols), (rows, cols), strict=True):
            if turned:
                arrays[gram] = arrays[basis] = Array((n, n), dtype)
        for state in states:
            if any((name in state) != (name in arrays) for name in _BASES):  # new, or other sides were turned
                for name in (*self._matrix_marks, *_ADAM):
                    state.pop(name, None)
        return Stack(params[0].device, states, arrays)

    def _direct(self, group: Group, stack: Stack, grads: Tensor, out: Tensor, places: Sequence[float]) -> None:
        beta = float(group["shampoo_beta"])
        beta = float(group["betas"][1]) if beta < 0 else beta
        left, right = (stack.arrays.get(name) for name in _BASES)
        factors = self._factors(grads, stack)
        for gram, a, b in (("gram_left", factors, factors.mT), ("gram_right", factors.mT, factors)):
            if gram in stack.arrays:
                stack[gram].baddbmm_(a, b, beta=beta, alpha=1 - beta)
        new = [i for i, state in enumerate(stack.states) if "refresh_in" not in state]
        if len(new) < len(stack.states):
            turned = self._scratch("turned", out, *out.shape)
            self._turn(factors, None if left is None else left.mT, right, turned)
            stepped = self._stepped(group, stack, turned)
            self._turn(self._factors(stepped, stack), left, None if right is None else right.mT, out)
        self._refresh_due(stack, group["precondition_frequency"])
        for i in new:
            out[i].zero_()
            _begin(stack, i, 1 + int(group["precondition_frequency"] * places[i]))

    def _stepped(self, group: Group, stack: Stack, turned: Tensor) -> Tensor:
        """Returns Adam's directions in the turned basis, in memory that the next stack uses, too."""
        outputs = self._scratch("stepped", turned, *turned.shape)
        if stack.adam is None or stack.adam[0] is not outputs:
            names = [f"matrix {i} of a stack" for i in range(len(outputs))]
            arrays = AdamArrays(*map(stack.views, _ADAM))
            stack.adam = outputs, AdamDirections(list(outputs.unbind(0)), arrays, names, group["backend"])
        stack.adam[1].write(list(turned.unbind(0)), self._adam(group))
        return outputs

    def _factors(self, matrices: Tensor, stack: Stack) -> Tensor:
        """Returns matrices in the dtype of the preconditioner."""
        dtype = next(stack[name].dtype for name in _BASES if name in stack.arrays)
        if matrices.dtype == dtype:
            return matrices
        return self._scratch("factors", matrices, *matrices.shape, dtype=dtype).copy_(matrices)

    def _turn(self, matrices: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor) -> None:
        """Compute ``out = left @ matrices @ right``."""
        narrow = matrices.dtype != out.dtype
        made = self._scratch("product", matrices, *matrices.shape) if narrow else out
        if left is None:
            assert right is not None
            torch.bmm(matrices, right, out=made)
        elif right is None:
            torch.bmm(left, matrices, out=made)
        else:
            half = torch.bmm(left, matrices, out=self._scratch("half", matrices, *matrices.shape))
            torch.bmm(half, right, out=made)
        if narrow:
            out.copy_(made)

    def _refresh_due(self, stack: Stack, period: int) -> None:
        due = []
        for i, state in enumerate(stack.states):
            if "refresh_in" not in state:
                continue
            state["refresh_in"] -= 1
            if state["refresh_in"] <= 0:
                state["refresh_in"] = period
                due.append(i)
        if due:
            _refresh(stack, due)


def _turned(group: Group, rows: int, cols: int) -> tuple[bool, bool]:
    """Returns whether the rows of a matrix are turned, and whether its columns are."""
    left, right = (n <= group["max_precond_dim"] for n in (rows, cols))
    one_sided = group["one_sided"]
    if left and right and (max(rows, cols) > _LONG if one_sided is None else one_sided):
        return rows <= cols, rows > cols
    return left, right


def _begin(stack: Stack, i: int, refresh_in: int) -> None:
    """Begin the bases of the ``i``-th matrix: eigenvectors after its first gradient, the largest eigenvalue's first."""
    for gram, basis in zip(_GRAMS, _BASES, strict=True):
        if gram not in stack.arrays:
            continue
        matrix = stack[gram][i]
        wide = matrix.to(max(matrix.dtype, torch.float32, key=lambda dtype: dtype.itemsize))
        stack[basis][i].copy_(_eigenvectors(wide).flip(1))
    for name in _ADAM:
        stack[name][i].zero_()
    stack.states[i]["refresh_in"] = refresh_in


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Returns those of a symmetric matrix, by ascending eigenvalue. Where many eigenvalues are equal, as with the first
    gradient of a wide convolution, LAPACK may fail in float32 or give NaN; float64 is tried then."""
    vectors: Tensor
    try:
        _, vectors = torch.linalg.eigh(matrix)
        if bool(vectors.isfinite().all()) or matrix.dtype == torch.float64:
            return vectors
    except RuntimeError:
        if matrix.dtype == torch.float64:
            raise
    return _eigenvectors(matrix.double()).to(matrix.dtype)


def _refresh(stack: Stack, due: list[int]) -> None:
    """Turn the bases of some matrices to where the power iteration brings them, and their first moments with them."""
    whole = len(due) == len(stack.states)
    moments = stack["exp_avg"] if whole else stack["exp_avg"][due]
    for gram, basis in zip(_GRAMS, _BASES, strict=True):
        if gram not in stack.arrays:
            continue
        matrices, old = (stack[name] if whole else stack[name][due] for name in (gram, basis))
        wide = moments.dtype
        new = torch.linalg.qr(torch.bmm(matrices, old).to(wide))[0]
        new = new.to(old.dtype)
        turn = torch.bmm(old.mT, new).to(wide)
        moments = torch.bmm(turn.mT, moments) if gram == "gram_left" else torch.bmm(moments, turn)
        _put(stack[basis], due, new)
    _put(stack["exp_avg"], due, moments)


def _put(stack: Tensor, indices: list[int], values: Tensor) -> None:
    stack.index_copy_(0, torch.tensor(indices, device=stack.device), values)
