"""Steps on a GPU, one by one and as a captured graph's replays."""

from __future__ import annotations

import torch
from torch import Tensor

from layerpipe_kernels.options import StepArguments
from layerpipe_kernels.plan import Arrays, StepPlan
from tests.kernels import steps
from tests.kernels.steps import Case


def on_gpu(tensors: object) -> object:
    if isinstance(tensors, Tensor):
        return tensors.cuda()
    return type(tensors)(on_gpu(x) for x in tensors)  # type: ignore[attr-defined, call-arg]


def plan_of(case: Case, arrays: Arrays, grads: list[Tensor], backend: str, chunk: int = 0) -> StepPlan:
    names = [f"weights[{i}]" for i in range(len(grads))]
    return StepPlan(case.rule, arrays, names=names, backend=backend, grad_dtype=grads[0].dtype, chunk=chunk)


def eager_and_replayed(case: Case, backend: str, count: int) -> tuple[Arrays, Arrays, Arrays, list[Tensor]]:
    """Makes ``count`` steps by a clock on the device; returns arrays before, after steps, after replays; clocks."""
    arrays, grads = case.make()
    options, design = case.options(), case.design(delay=3)
    eager, captured = steps.cloned(arrays), steps.cloned(arrays)
    clocks = [torch.tensor(0, device="cuda") for _ in range(2)]
    plan = plan_of(case, eager, grads, backend)
    for _ in range(count):
        plan.step(grads, options, design, StepArguments(clock=clocks[0]))
    plan = plan_of(case, captured, grads, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plan.step(grads, options, design, StepArguments(clock=clocks[1]))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.step(grads, options, design, StepArguments(clock=clocks[1]))
    for _ in range(count - 1):
        graph.replay()
    torch.cuda.synchronize()
    return arrays, eager, captured, clocks
