"""What goes wrong is said with the stage's name, and options that cannot be are refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, pipeline, sgd


class Broken(nn.Linear):
    """Raises in its third forward or backward."""

    def __init__(self, where: str, width: int = 6) -> None:
        super().__init__(width, width)
        self.where, self.calls = where, 0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.where == "backward":
            y.register_hook(self.fail)
        else:
            self.fail(x)
        return y

    def fail(self, _: Tensor) -> None:
        self.calls += 1
        if self.calls == 3:
            raise KeyError("the matter")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_exception_reaches_the_caller_with_the_stage(executor: str, where: str, stage: int) -> None:
    stages: list[nn.Module] = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    stages[stage] = Broken(where)
    with pipeline(stages, executor=executor) as pipe:

        def run() -> None:
            for x, y in minibatches(30):
                pipe.step(x, y)
            pipe.drain()

        with pytest.raises(layerpipe.StageError, match=rf"stage {stage} \(Broken\).*the matter") as caught:
            run()
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.stage == f"stage {stage} (Broken)"
        with pytest.raises(RuntimeError, match="stopped after an error"):
            pipe.step(*minibatches(1)[0])
        with pytest.raises(RuntimeError, match="stopped after an error"):
            pipe.load_state_dict(pipe.state_dict())
        with pytest.raises(RuntimeError, match="stopped after an error"):
            pipe.drain()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_exception_in_the_loss_names_the_last_stage(executor: str) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("no loss today")

    with (
        layerpipe.Pipeline(chain(3), loss_fn, sgd, executor=executor) as pipe,
        pytest.raises(layerpipe.StageError, match=r"stage 2 \(Linear\).*no loss today"),
    ):
        for x, y in minibatches(5):
            pipe.step(x, y)
        pipe.drain()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_divergence_stops_with_the_stage_and_an_advice(executor: str) -> None:
    stages = chain()
    pipe = layerpipe.Pipeline(
        stages,
        F.cross_entropy,
        lambda params, **past: lk.SGD(params, lr=1e30, **past),
        past="latest",
        executor=executor,
    )
    with (
        pipe,
        pytest.raises(layerpipe.DivergenceError, match=r"stage \d .*not finite.*try past='blend'.*lower learning"),
    ):
        for x, y in minibatches(50):
            pipe.step(x, y)
    finite = [torch.isfinite(p).all() for p in pipe.parameters()]
    assert any(finite)


def test_a_nan_in_the_data_is_found_in_the_first_stage() -> None:
    with pipeline() as pipe, pytest.raises(layerpipe.DivergenceError, match=r"stage 0 .*output of minibatch 0"):
        pipe.step(torch.full((8, 6), float("nan")), torch.zeros(8, dtype=torch.long))


def test_load_state_dict_refuses_a_full_pipe_and_other_names() -> None:
    with pipeline() as pipe:
        state = copy.deepcopy(pipe.state_dict())
        with pytest.raises(RuntimeError, match=r"missing \['0.0.bias'"):
            pipe.load_state_dict({"other": torch.ones(1)})
        pipe.step(*minibatches(1)[0])
        with pytest.raises(RuntimeError, match="drain"):
            pipe.load_state_dict(state)
        pipe.drain()
        pipe.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in pipe.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stages": []}, ValueError, "at least one stage"),
        ({"stages": ["conv1"]}, TypeError, "stage 0 is a str"),
        ({"stages": nn.Linear(2, 2)}, TypeError, "stages is a Linear; cut it with layerpipe.split"),
        ({"loss_fn": None}, TypeError, "loss_fn is a NoneType, not a function of output and target"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)}, TypeError, "optimizer is a SGD, not a function that"),
        ({"max_norm": 0}, ValueError, "max_norm must be more than 0"),
        ({"max_norm": -1.0}, ValueError, "max_norm must be more than 0"),
        ({"max_norm": float("nan")}, ValueError, "max_norm must be more than 0"),
        ({"past": "tomorrow"}, ValueError, "past='tomorrow' is unknown"),
        ({"schedule": "gpipe"}, ValueError, "schedule='gpipe' is unknown.*lockstep, 1f1b, sequential"),
        ({"executor": "fibers"}, ValueError, "executor='fibers' is unknown.*serial, threads"),
        (
            {"optimizer": lambda params, **past: torch.optim.SGD(params, lr=0.1)},
            TypeError,
            "SGD does not know its past",
        ),
    ],
)
def test_bad_options_are_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"stages": chain(), "loss_fn": F.cross_entropy, "optimizer": sgd, **change}
    with pytest.raises(error, match=message):
        layerpipe.Pipeline(**options)


def test_what_an_optimizer_of_ones_own_lacks_is_named() -> None:
    class Own(torch.optim.SGD):
        def past_view(self, param: Tensor) -> Tensor:
            return param.detach()

    def make(params: Any, **_: Any) -> Any:
        return Own(params, lr=0.1)

    with pytest.raises(TypeError, match=r"stage 0 .*Own does not know its past weights: it has no restart_history"):
        layerpipe.Pipeline(chain(), F.cross_entropy, make)
    Own.restart_history = lambda self: None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"stage 0 .*has a delay of 6, a parameter group of its optimizer one of None"):
        layerpipe.Pipeline(chain(), F.cross_entropy, make)


def test_a_parameter_in_two_stages_is_refused() -> None:
    shared = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="stage 0 and in stage 1"):
        pipeline([shared, shared])


def test_in_place_change_of_an_activation_is_still_noticed() -> None:
    class Spoil(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(x)
            z = y * 1.0
            y.detach().add_(1)
            return z

    with (
        pipeline([nn.Linear(6, 6), nn.Sequential(Spoil(), nn.Linear(6, 3))]) as pipe,
        pytest.raises(layerpipe.StageError, match="modified in place"),
    ):
        for x, y in minibatches(4):
            pipe.step(x, y)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_modes_that_reach_no_other_thread_are_refused(executor: str) -> None:
    with pipeline(executor=executor) as pipe:
        with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
            pipe.step(*minibatches(1)[0])
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
            pipe.step(*minibatches(1)[0])
        assert pipe.step(*minibatches(1)[0]) is None
        assert len(pipe.drain()) == 1


def test_a_state_trained_with_other_delays_is_refused() -> None:
    with pipeline(schedule="1f1b") as plain, pipeline() as pipe:
        for each in (plain, pipe):
            for x, y in minibatches(8):
                each.step(x, y)
            each.drain()
        with pytest.raises(ValueError, match=r"group 0 was trained with delay=3, this pipeline has delay=6"):
            pipe.optimizer.load_state_dict(plain.optimizer.state_dict())
        assert [g["delay"] for g in pipe.optimizer.param_groups] == [6, 0, 4, 2, 0]


def test_a_factory_that_drops_the_delay_or_a_parameter_is_found_out() -> None:
    with pytest.raises(ValueError, match=r"stage 0 .*has a delay of 6, a parameter group of its optimizer one of 0"):
        layerpipe.Pipeline(chain(), F.cross_entropy, lambda params, **past: lk.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match=r"stage 0 .*given 0\.weight, but holds it"):
        layerpipe.Pipeline(chain(), F.cross_entropy, lambda params, **past: sgd(params[1:], **past))


def test_groups_cannot_be_added_to_a_pipeline() -> None:
    with pipeline() as pipe, pytest.raises(RuntimeError, match="new pipeline"):
        pipe.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("threads", [0, -1, [1, 1, 0, 1], [1, 1]], ids=str)
def test_no_threads_are_refused(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads_per_stage"):
        pipeline(executor="threads", threads_per_stage=threads)


def test_a_bad_last_update_is_found_when_the_pipe_is_empty() -> None:
    with layerpipe.Pipeline(
        [nn.Linear(6, 3)], F.cross_entropy, lambda p, **past: lk.SGD(p, lr=1e38, weight_decay=1e5, **past)
    ) as pipe:
        pipe.step(*minibatches(1)[0])
        with pytest.raises(layerpipe.DivergenceError, match="a weight is not finite after 1 updates"):
            pipe.drain()


def test_a_loss_without_a_gradient_is_refused() -> None:
    with (
        layerpipe.Pipeline(chain(2), lambda a, b: F.cross_entropy(a, b).detach(), sgd) as pipe,
        pytest.raises(layerpipe.StageError, match="depends on no trained weight"),
    ):
        for x, y in minibatches(3):
            pipe.step(x, y)


def test_a_stage_that_returns_a_list_is_told_so() -> None:
    class Lists(nn.Linear):
        def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
            return [super().forward(x)]

    with pipeline([Lists(6, 6), nn.Linear(6, 3)]) as pipe, pytest.raises(layerpipe.StageError, match="got list"):
        pipe.step(*minibatches(1)[0])


def test_inputs_that_want_gradients_are_refused() -> None:
    with pipeline() as pipe, pytest.raises(ValueError, match=r"no gradient of its inputs; pass inputs\.detach"):
        pipe.step(torch.randn(8, 6, requires_grad=True), torch.zeros(8, dtype=torch.long))


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(layerpipe.DivergenceError("stage 1", "no")))
    assert isinstance(error, layerpipe.DivergenceError)
    assert str(error) == "stage 1: no"
