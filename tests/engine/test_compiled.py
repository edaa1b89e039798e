"""Stages that torch.compile has compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import minibatches
from tests.engine.pipelines import trained


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_compiled_stages_see_past_weights(schedule: str) -> None:
    """Inductor's kernels round otherwise, so close to the eager weights and far from those without a past."""
    data = minibatches(16)

    def stages(compiled: bool) -> list[nn.Module]:
        torch.manual_seed(0)
        made = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)]
        layers: list[nn.Module] = [*made, nn.Linear(6, 3)]
        return [torch.compile(layer) if compiled else layer for layer in layers]  # type: ignore[misc]

    def run(compiled: bool, past: str) -> dict[str, Tensor]:
        state = trained(stages(compiled), data, lambda p, **k: lk.SGD(p, lr=0.5, **k), past=past, schedule=schedule)
        return {name.replace("_orig_mod.", ""): value for name, value in state.items()}

    eager, latest, compiled = run(False, "stash"), run(False, "latest"), run(True, "stash")
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-4)
    assert any((latest[name] - eager[name]).abs().max() > 1e-2 for name in eager)


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_compiled_stages_train_as_they_are_written(executor: str) -> None:
    """The workers compile at the same time, and one may step while another compiles."""

    def run(compiled: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
        stages = layerpipe.split(model, 3, balance="params")
        if compiled:
            stages = [torch.compile(stage, backend="aot_eager") for stage in stages]  # type: ignore[misc]
        with layerpipe.Pipeline(
            stages, F.cross_entropy, lambda p, **past: lk.SGD(p, lr=0.1, momentum=0.9, **past), executor=executor,
            threads_per_stage=1,
        ) as pipe:  # fmt: skip
            for x, y in minibatches(12):
                pipe.step(x, y)
            pipe.drain()
            assert pipe.names == ["0 … 1", "2", "3"]
            assert pipe.state_dict().keys() == dict(pipe.named_parameters()).keys() == model.state_dict().keys()
            return pipe.state_dict()

    eager, compiled = run(False), run(True)
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)
