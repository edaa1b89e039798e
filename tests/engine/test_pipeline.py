"""What a user of the pipeline sees: results, errors, state."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain, minibatches

EXECUTORS = ["serial", "threads"]


def sgd(params: list[Tensor], **past: Any) -> lk.SGD:
    return lk.SGD(params, lr=0.05, momentum=0.9, **past)


def pipeline(stages: list[nn.Module] | None = None, **options: Any) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(stages or chain(), F.cross_entropy, sgd, **options)


def workers() -> int:
    return sum(t.name.startswith("layerpipe ") for t in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_left() -> Any:
    before = workers()
    yield
    deadline = time.monotonic() + 10
    while workers() > before and time.monotonic() < deadline:
        gc.collect()  # again and again: a worker still in its tick holds the pipeline until that ends
        time.sleep(0.01)
    assert workers() == before


@pytest.mark.parametrize("executor", EXECUTORS)
def test_losses_come_out_in_order_and_none_is_lost(executor: str) -> None:
    data = minibatches(12)
    with pipeline(executor=executor) as pipe:
        for _ in range(2):  # a drained pipe fills again
            got = [pipe.step(x, y) for x, y in data]
            assert [loss is None for loss in got] == [i < pipe.latency for i in range(12)]
            assert len(pipe.drain()) == pipe.latency
        assert pipe.in_flight == 0
        assert all(s.version == 24 for s in pipe.stages)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_losses_are_those_of_their_minibatches(executor: str) -> None:
    """With a learning rate of 0 and no running statistics, each loss is the plain one."""
    stages = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    data = minibatches(7)
    pipe = layerpipe.Pipeline(
        stages, F.cross_entropy, lambda params, **past: lk.SGD(params, lr=0.0, **past), executor=executor
    )
    with pipe:
        got = [loss for x, y in data if (loss := pipe.step(x, y)) is not None] + pipe.drain()
    want = [F.cross_entropy(nn.Sequential(*stages)(x), y) for x, y in data]
    torch.testing.assert_close(torch.stack(got), torch.stack(want))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_training_learns(executor: str) -> None:
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    with pipeline(executor=executor) as pipe:
        losses = [loss for _ in range(150) if (loss := pipe.step(x, y)) is not None]
        assert losses[-1] < 0.2 < losses[0]


def test_drain_of_an_empty_pipe_and_twice() -> None:
    with pipeline() as pipe:
        assert pipe.drain() == []
        pipe.step(*minibatches(1)[0])
        assert len(pipe.drain()) == 1
        assert pipe.drain() == []


def test_evaluation_uses_current_weights_and_disturbs_nothing() -> None:
    data, x = minibatches(20), torch.randn(5, 6)
    results = []
    for look in (False, True):
        with pipeline(executor="threads") as pipe:
            for step, (inputs, target) in enumerate(data):
                pipe.step(inputs, target)
                if look and step % 3 == 0:
                    pipe.eval()
                    with torch.no_grad():
                        assert torch.equal(pipe(x), nn.Sequential(*pipe.modules)(x))
                    pipe.train()
            pipe.drain()
            results.append(copy.deepcopy(pipe.state_dict()))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_stages_may_pass_tuples(executor: str) -> None:
    class Fork(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    class Join(nn.Linear):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.tanh(y) + x)

    stages = [nn.Linear(6, 6), Fork(6, 6), Join(6, 3)]
    assert_sequential_schedule_is_plain_training(stages, executor, lambda x: stages[2](*stages[1](stages[0](x))))
    with pipeline(stages, executor=executor, past="stash") as pipe:
        for x, y in minibatches(10):
            pipe.step(x, y)
        pipe.drain()
        assert pipe(torch.randn(2, 6)).shape == (2, 3)


def assert_sequential_schedule_is_plain_training(stages: list[nn.Module], executor: str, forward: Any) -> None:
    """Trains the stages, and then the same weights in a plain loop over ``forward``, which runs the stages."""
    torch.set_num_threads(1)
    modules = nn.ModuleList(stages)
    start, data = copy.deepcopy(modules.state_dict()), minibatches(6)
    with pipeline(stages, executor=executor, schedule="sequential") as pipe:
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()
    piped = copy.deepcopy(modules.state_dict())
    modules.load_state_dict(start)
    optimizer = sgd([p for p in modules.parameters() if p.requires_grad])
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
    assert all(torch.equal(value, piped[name]) for name, value in modules.state_dict().items())


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


def test_schedulers_and_options_reach_the_stages() -> None:
    with pipeline() as pipe:
        scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 1, gamma=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in minibatches(8):
                pipe.step(x, y)
                used = [g["lr"] for s in pipe.stages if s.version for g in s.optimizer.param_groups]  # type: ignore[union-attr]
                assert set(used) == ({scheduler.get_last_lr()[0]} if pipe.tick > 3 else set())
                scheduler.step()
        assert len(pipe.optimizer.param_groups) == 4
        assert "momentum_buffer" in next(iter(pipe.optimizer.state.values()))
        with pytest.raises(RuntimeError, match=r"pipe\.step"):
            pipe.optimizer.step()


def test_gradients_are_clipped_per_stage() -> None:
    with pipeline(max_norm=1e-3) as pipe:
        for x, y in minibatches(10):
            pipe.step(x, y)
        for stage in pipe.stages:
            norm = torch.stack([p.grad.norm() for p in stage.module.parameters()]).norm()  # type: ignore[union-attr]
            assert norm <= 1.001e-3


def test_state_dict_of_stages_by_hand_is_that_of_sequential() -> None:
    stages = chain()
    with pipeline(stages) as pipe:
        assert pipe.state_dict().keys() == nn.Sequential(*stages).state_dict().keys()
        assert dict(pipe.named_parameters()).keys() == dict(nn.Sequential(*stages).named_parameters()).keys()


@pytest.mark.parametrize("past", ["ema", "blend", "stash"])
def test_a_loaded_pipeline_continues_bitwise(past: str) -> None:
    data = minibatches(20)
    with pipeline(past=past) as whole, pipeline(chain(seed=9), past=past) as resumed:
        for x, y in data[:10]:
            whole.step(x, y)
        whole.drain()
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        for pipe in (whole, resumed):
            for x, y in data[10:]:
                pipe.step(x, y)
            pipe.drain()
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name])


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
        ({"past": "tomorrow"}, ValueError, "past='tomorrow' is unknown"),
        ({"schedule": "gpipe"}, ValueError, "schedule='gpipe' is unknown.*lockstep, sequential"),
        ({"executor": "fibers"}, ValueError, "executor='fibers' is unknown.*serial, threads"),
        (
            {"optimizer": lambda params, **past: torch.optim.SGD(params, lr=0.1)},
            TypeError,
            "SGD does not know its past",
        ),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"stages": chain(), "loss_fn": F.cross_entropy, "optimizer": sgd, **change}
    with pytest.raises(error, match=message):
        layerpipe.Pipeline(**options)


def test_a_parameter_in_two_stages_is_refused() -> None:
    shared = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="stage 0 and in stage 1"):
        pipeline([shared, shared])


def test_stages_without_parameters_and_frozen_ones() -> None:
    frozen = nn.Linear(6, 6).requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    stages = [nn.Linear(6, 6), nn.Tanh(), frozen, nn.Linear(6, 3)]
    assert_sequential_schedule_is_plain_training(stages, "serial", nn.Sequential(*stages))
    with pipeline(stages, past="stash") as pipe:
        for x, y in minibatches(12):
            pipe.step(x, y)
        pipe.drain()
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


def test_a_copied_weight_is_reported_once_with_its_name() -> None:
    stages = chain(3)
    stages[0] = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    with pipeline(stages) as pipe, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in minibatches(8):
            pipe.step(x, y)
    messages = [str(w.message) for w in caught if "works on copies" in str(w.message)]
    assert len(messages) == 1
    assert "stage 0" in messages[0]
    assert "0.parametrizations.weight.original1" in messages[0]


def test_autocast_is_reported_and_its_copies_are_still_right() -> None:
    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    with (
        pytest.warns(UserWarning, match=r"stage 0 .*copies of .*weight"),
        pipeline([Cast(6, 6), nn.Linear(6, 3)]) as pipe,
    ):
        for x, y in minibatches(8):
            pipe.step(x, y)


def test_lookups_and_views_are_no_copies() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.weight = nn.Embedding(10, 6), nn.Parameter(torch.randn(12, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.table(x.abs().long().clamp(max=9)).mean(1)
            return y @ self.weight[:6].t() + y @ self.weight.view(2, 6, 6)[1]

    with pipeline([Views(), nn.Linear(6, 3)]) as pipe, warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in minibatches(6):
            pipe.step(x, y)


def test_plain_layers_are_not_reported_as_copies() -> None:
    with pipeline() as pipe, warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in minibatches(4):
            pipe.step(x, y)


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


@pytest.mark.parametrize("past", ["stash", "ema", "blend"])
def test_memory_report_adds_up(past: str) -> None:
    with pipeline(past=past) as pipe:
        for x, y in minibatches(20):
            pipe.step(x, y)
        report = pipe.memory()
    for stage, memory in zip(pipe.stages, report, strict=True):
        weights = sum(p.nbytes for p in stage.module.parameters())
        copies = {"stash": stage.delay, "ema": min(stage.delay, 1), "blend": min(2, max(0, stage.delay - 1))}[past]
        assert memory.weights == memory.optimizer == weights
        assert memory.history == copies * weights
        assert memory.stash == stage.delay * weights
        assert (memory.scratch > 0) == (stage.delay > 0)
        assert memory.activations > 0
    # More minibatches are in flight the further a stage is from the end.
    assert report[0].activations > report[2].activations


def test_threads_of_the_caller_are_left_alone() -> None:
    before = torch.get_num_threads()
    with pipeline(executor="threads"):
        assert torch.get_num_threads() == before


def test_a_forgotten_pipeline_ends_its_workers() -> None:
    pipe = pipeline(executor="threads")
    for x, y in minibatches(6):
        pipe.step(x, y)
    assert workers() >= 4
    del pipe  # the fixture sees the threads gone


def test_a_closed_pipeline_can_be_read_but_not_trained() -> None:
    pipe = pipeline(executor="threads")
    pipe.step(*minibatches(1)[0])
    pipe.close()
    pipe.close()
    assert pipe.state_dict()
    with pytest.raises(RuntimeError, match="closed"):
        pipe.step(*minibatches(1)[0])


def test_a_program_may_end_without_closing_its_pipeline() -> None:
    program = """
import torch, layerpipe, layerpipe_kernels as lk
pipe = layerpipe.Pipeline(
    [torch.nn.Linear(500, 500) for _ in range(3)], lambda a, b: (a - b).square().mean(),
    lambda p, **past: lk.SGD(p, lr=0.1, **past), executor="threads")
for _ in range(5):
    pipe.step(torch.randn(2000, 500), torch.randn(2000, 500))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_compute_with_the_threads_they_are_given() -> None:
    class Count(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(torch.get_num_threads())
            return y

    seen: list[int] = []
    torch.set_num_threads(2)
    stages = [Count(6, 6), nn.Linear(6, 3)]
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, executor="threads", threads_per_stage=1) as pipe:
        for x, y in minibatches(3):
            pipe.step(x, y)
        pipe.drain()
    assert seen == [1, 1, 1]


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
    with pipeline(schedule="sequential") as plain, pipeline() as pipe:
        for each in (plain, pipe):
            for x, y in minibatches(8):
                each.step(x, y)
            each.drain()
        with pytest.raises(ValueError, match=r"group 0 was trained with delay=0, this pipeline has delay=6"):
            pipe.optimizer.load_state_dict(plain.optimizer.state_dict())
        assert [g["delay"] for g in pipe.optimizer.param_groups] == [6, 4, 2, 0]


def test_a_factory_that_drops_the_delay_or_a_parameter_is_found_out() -> None:
    with pytest.raises(ValueError, match=r"stage 0 .*has a delay of 6, its optimizer one of 0"):
        layerpipe.Pipeline(chain(), F.cross_entropy, lambda params, **past: lk.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match=r"stage 0 .*given 0\.weight, but holds it"):
        layerpipe.Pipeline(chain(), F.cross_entropy, lambda params, **past: sgd(params[1:], **past))


def test_groups_cannot_be_added_to_a_pipeline() -> None:
    with pipeline() as pipe, pytest.raises(RuntimeError, match="new pipeline"):
        pipe.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_minibatches_in_flight_are_freed_with_the_pipeline() -> None:
    """A layer that saves its own output must not keep itself alive through the hooks."""
    pipe = pipeline([nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)])
    pipe.step(*minibatches(1)[0])
    output = weakref.ref(pipe.stages[0]._flights[0].outputs[0])
    assert output() is not None
    pipe.close()
    gc.collect()
    assert output() is None


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="threads_per_stage"):
        pipeline(executor="threads", threads_per_stage=threads)


def test_large_half_precision_outputs_are_finite() -> None:
    class Big(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 0 + 100).half()

    class Back(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    with pipeline([Big(6, 600), Back(600, 3)]) as pipe:
        for x, y in minibatches(4, size=16):
            pipe.step(x, y)


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


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(layerpipe.DivergenceError("stage 1", "no")))
    assert isinstance(error, layerpipe.DivergenceError)
    assert str(error) == "stage 1: no"
