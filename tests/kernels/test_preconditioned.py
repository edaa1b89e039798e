"""What SOAP and Muon have in common: which parameters they precondition, and a past like every optimizer here."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe_kernels as lk

Make = Callable[..., Any]
MAKE: dict[str, Make] = {
    "soap": lambda params, **options: lk.SOAP(params, **{"lr": 0.01, "precondition_frequency": 4, **options}),
    "one-sided soap": lambda params, **options: lk.SOAP(
        params, **{"lr": 0.01, "precondition_frequency": 4, "one_sided": True, **options}
    ),
    "muon": lambda params, **options: lk.Muon(params, **{"lr": 0.01, **options}),
}
PASTS: list[dict[str, Any]] = [
    {"past": "stash"},
    {"past": "latest"},
    {"past": lk.EMA(dtype=torch.bfloat16)},
    {"past": lk.Blend(order=2, decay="coupled")},
    {"past": lk.Blend(order=3, materialize=True)},
    {"past": lk.Blend(order=1, norm="match")},
    {"past": "blend", "spike_compensation": 1.0, "weight_prediction": 0.5},
]
SHAPES = ((6, 5), (7,), (4, 3, 2, 2), (6, 5), (5, 5))


class Run:
    def __init__(self, make: Make, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(seed)
        self.params = [torch.randn(s, requires_grad=True, dtype=dtype) for s in SHAPES]
        self.optimizer = make(self.params, **options)
        self.versions = [[p.detach().clone() for p in self.params]]

    def step(self, count: int = 1, seed: int = 1, without: int | None = None) -> None:
        """``without``: the place of a parameter that has no gradient."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for i, param in enumerate(self.params):
                grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.grad = None if i == without else grad
            self.optimizer.step()
            self.versions.append([p.detach().clone() for p in self.params])

    def everything(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.params]
        arrays = [torch.as_tensor(v) for s in states for _, v in sorted(s.items())]
        return [t.detach().clone() for t in (*self.params, *arrays, *map(self.optimizer.past_weight, self.params))]


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("past", PASTS, ids=str)
def test_a_delay_changes_no_step(make: Make, past: dict[str, Any]) -> None:
    if "spike_compensation" in past:
        past = {**past, "spike_compensation": 0.0}
    plain, delayed = Run(make), Run(make, delay=4, **past)
    for run in (plain, delayed):
        run.step(9)
    delayed.optimizer.eval()
    for a, b in zip(plain.params, delayed.params, strict=True):
        close = {"rtol": 1e-5, "atol": 1e-6} if past.get("weight_prediction") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, b, **close)
    assert plain.optimizer.history_bytes() == 0


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("past", [p for p in PASTS if p["past"] != "latest"], ids=str)
def test_the_past_is_exact_while_the_pipe_fills_and_near_afterwards(make: Make, past: dict[str, Any]) -> None:
    run = Run(make, delay=4, **past)
    run.step(1)
    run.optimizer.restart_history()
    run.versions = [[p.detach().clone() for p in run.params]]
    close = {"rtol": 1e-3, "atol": 1e-3} if lk.past.parse(past["past"]).dtype else {"rtol": 2e-6, "atol": 2e-6}
    errors, changes = [0.0] * len(SHAPES), [0.0] * len(SHAPES)
    for t in range(1, 16):
        run.step(1, seed=t)
        for i, param in enumerate(run.params):
            true, estimate = run.versions[max(0, t - 4)][i], run.optimizer.past_weight(param)
            if t <= 4 or past["past"] == "stash":
                torch.testing.assert_close(estimate, true, **close)
            errors[i] += float((estimate - true).square().sum())
            changes[i] += float((param.detach() - true).square().sum())
    assert all(error < 0.8 * change for error, change in zip(errors, changes, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("past", PASTS, ids=str)
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resume_is_bitwise(make: Make, past: dict[str, Any], how: str, dtype: torch.dtype) -> None:
    past = {**past, "master_weights": dtype == torch.bfloat16}
    run = Run(make, dtype=dtype, delay=3, **past)
    run.step(6)
    run.step(1, without=0)
    if how == "file":
        other = Run(make, seed=5, dtype=dtype, delay=3, **past)
        file = io.BytesIO()
        torch.save(run.optimizer.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            for param, source in zip(other.params, run.params, strict=True):
                param.copy_(source)
        other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    else:
        pair = (run.params, run.optimizer)
        other = copy.copy(run)
        other.params, other.optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert all(map(torch.equal, run.everything(), other.everything()))
    for each in (run, other):
        each.step(7, seed=8)
    assert all(map(torch.equal, run.everything(), other.everything()))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_grad_scaler_skips_an_overflow_and_nothing_changes(make: Make) -> None:
    run = Run(make, delay=3)
    run.step(5)
    before = run.everything()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for param in run.params:
        param.grad = torch.full_like(param, float("inf"))
    scaler.step(run.optimizer)
    scaler.update()
    assert all(map(torch.equal, before, run.everything()))
    assert run.optimizer.param_groups[0]["updates"] == 5


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_gradients_are_only_read(make: Make) -> None:
    run = Run(make, maximize=True)
    run.step(3)
    grads = [torch.randn_like(p) for p in run.params]
    for param, grad in zip(run.params, grads, strict=True):
        param.grad = grad.clone()
    run.optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(run.params, grads, strict=True))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_maximize_steps_the_other_way(make: Make) -> None:
    up, down = Run(make, maximize=True, weight_decay=0.0), Run(make, weight_decay=0.0)
    for run in (up, down):
        run.step(6)
    for a, b, start in zip(up.params, down.params, down.versions[0], strict=True):
        torch.testing.assert_close(a.detach() - start, start - b.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_parameter_without_a_gradient_stays_and_the_others_do_as_they_would(make: Make) -> None:
    run, others = Run(make, delay=2), Run(make, delay=2)
    for t in range(8):
        run.step(1, seed=t, without=3 if t in (0, 1, 5) else None)
        others.step(1, seed=t)
    assert torch.equal(run.versions[2][3], run.versions[0][3])
    assert torch.equal(run.versions[6][3], run.versions[5][3])
    assert torch.equal(run.params[1], others.params[1])
    torch.testing.assert_close(run.optimizer.past_weight(run.params[3]), run.versions[-3][3], rtol=0, atol=0.05)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("knobs", [{}, {"spike_compensation": 1.0, "weight_prediction": 1.0}], ids=str)
def test_the_order_in_memory_does_not_matter(make: Make, knobs: dict[str, float]) -> None:
    torch.manual_seed(0)
    kernel, matrix = torch.randn(4, 3, 2, 2), torch.randn(6, 5)
    natural = [kernel.clone().requires_grad_(), matrix.clone().requires_grad_()]
    other = [
        kernel.to(memory_format=torch.channels_last).requires_grad_(),
        matrix.t().contiguous().t().requires_grad_(),
    ]
    optimizers = [make(params, delay=2, **knobs) for params in (natural, other)]
    for _ in range(8):
        for a, b in zip(natural, other, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(natural, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizers[0].past_weight(a), optimizers[1].past_weight(b))
        assert torch.equal(optimizers[0].current_weight(a), optimizers[1].current_weight(b))
    assert not other[1].is_contiguous()


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_half_precision_weights_keep_their_state_in_float32(make: Make) -> None:
    run = Run(make, dtype=torch.bfloat16)
    run.step(3)
    states = [run.optimizer.state[p] for p in run.params]
    assert {v.dtype for s in states for v in s.values() if isinstance(v, Tensor)} == {torch.float32}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_masters_are_stepped_as_float32_weights_are(make: Make) -> None:
    narrow, wide = Run(make, dtype=torch.bfloat16, master_weights=True, delay=2), Run(make, delay=2)
    with torch.no_grad():
        for a, b in zip(narrow.params, wide.params, strict=True):
            b.copy_(a)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        for a, b in zip(narrow.params, wide.params, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(torch.bfloat16)
            b.grad = a.grad.float()
        narrow.optimizer.step()
        wide.optimizer.step()
    for a, b in zip(narrow.params, wide.params, strict=True):
        assert torch.equal(narrow.optimizer.state[a]["master"], b)
        assert torch.equal(a, b.bfloat16())
        assert torch.equal(narrow.optimizer.past_weight(a), wide.optimizer.past_weight(b).bfloat16())


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_groups_have_their_own_options_and_more_may_be_added(make: Make) -> None:
    run = Run(make, delay=2)
    late = torch.randn(4, 4, requires_grad=True)
    run.step(2)
    run.optimizer.add_param_group({"params": [late], "delay": 4, "past": "stash", "lr": 0.0, "precondition": False})
    start = late.detach().clone()
    for seed in range(3):
        late.grad = torch.ones(4, 4)
        run.step(1, seed=seed)
    assert torch.equal(late, start)
    assert run.optimizer.state[late]["exp_avg"].shape == (4, 4)
    assert run.optimizer.state[late]["stash"].shape == (4, 4, 4)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_sparse_gradient_is_refused_before_anything_is_written(make: Make) -> None:
    table, other = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3, 3))
    optimizer = make([{"params": [other]}, {"params": table.parameters()}])
    other.grad = torch.ones(3, 3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[0\]"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3, 3))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.position_table = nn.Parameter(torch.randn(3, 4))
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Conv1d(6, 4, 3))
        self.head = nn.Linear(4, 11)


def preconditioned(optimizer: Any, network: nn.Module) -> set[str]:
    for param in network.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    keys = {"basis_left", "momentum_buffer"}
    return {name for name, p in network.named_parameters() if keys & optimizer.state[p].keys()}


BODY = {"body.0.weight", "body.2.weight"}
TABLES = {"tokens.weight", "position_table", "head.weight"}


@pytest.mark.parametrize("make", [MAKE["soap"], MAKE["muon"]], ids=["soap", "muon"])
def test_embeddings_and_heads_are_known_by_name_or_by_mark_or_by_a_groups_option(make: Make) -> None:
    network = Network()
    assert preconditioned(make(network.parameters()), network) == BODY | TABLES
    assert preconditioned(make(network.named_parameters()), network) == BODY | {"tokens.weight"}
    assert preconditioned(make(network.parameters(), precondition=False), network) == set()
    lk.mark_embeddings_and_output(network)
    assert preconditioned(make(network.parameters()), network) == BODY
    assert preconditioned(make(network.parameters(), precondition=True), network) == BODY | TABLES


def test_the_output_layer_of_a_part_is_its_last_only_where_it_has_the_output() -> None:
    part = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    lk.mark_embeddings_and_output(part, output=False)
    assert preconditioned(lk.SOAP(part.parameters()), part) == {"0.weight", "1.weight"}
    lk.mark_embeddings_and_output(part)
    assert preconditioned(lk.SOAP(part.parameters()), part) == {"0.weight"}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_step_cannot_be_captured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make([torch.ones(3, 3, requires_grad=True)])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer._refuse_capture(torch.device("cuda"))
    optimizer._refuse_capture(torch.device("cpu"))
