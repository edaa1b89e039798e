from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels import backend as backends
from layerpipe_kernels import ops
from layerpipe_kernels.options import AdamOptions, PastDesign, SgdOptions, StepArguments
from layerpipe_kernels.plan import Arrays
from tests.backends import needs_cpp
from tests.kernels.steps import Case, cloned

PLAIN = SgdOptions(lr=0.1)
step = functools.partial(ops.sgd_step_, options=PLAIN)
adam = functools.partial(ops.adamw_step_, options=AdamOptions(lr=0.1))
MEMORY = torch.randn(10)
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1, 17, 40_000, 300_001])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4])
def test_reconstruct_adds_its_terms(backend: str, size: int, terms: int) -> None:
    weight = torch.randn(size)
    states, taps = [torch.randn(size) for _ in range(terms)], [1.5, -2.0, 0.25, 3.0][:terms]
    out = torch.full_like(weight, float("nan"))
    result = ops.reconstruct(weight, states, taps, out=out, backend=backend)
    want = weight.double() + sum((t * s.double() for t, s in zip(taps, states, strict=True)), torch.zeros(()))
    assert result is out
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reconstruct_makes_its_output(backend: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    out = ops.reconstruct(weight, [torch.ones(3, 4)], [2.0], backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, weight.detach() + 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ema_update(backend: str) -> None:
    emas, update = [torch.ones(5), torch.zeros(5)], torch.full((5,), 4.0)
    version = emas[0]._version
    ops.ema_update_(emas, update, [0.5, 0.75], backend=backend)
    assert torch.equal(emas[0], torch.full((5,), 2.5))
    assert torch.equal(emas[1], torch.full((5,), 1.0))
    assert emas[0]._version > version


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [2, 3])
def test_averages_that_turn_are_one_complex_average(backend: str, count: int) -> None:
    start, pole = torch.randn(count, 700, dtype=torch.float64), complex(0.8, 0.3)
    emas, z = [e.float() for e in start], torch.complex(start[0], start[1])
    for _ in range(5):
        update = torch.randn(700)
        ops.ema_update_(emas, update, [0.8, 0.8, 0.5][:count], turn=0.3, backend=backend)
        u = torch.complex(update.double(), update.double())
        z = u + pole * (z - u)
    for e, part in zip(emas, (z.real, z.imag), strict=False):
        torch.testing.assert_close(e.double(), part, rtol=0, atol=1e-6)


def turned() -> Tensor:
    return torch.randn(4, 6).t()


def strided() -> Tensor:
    return torch.randn(6, 8)[:, ::2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.reconstruct(strided(), [], []), ValueError, "weight .*gaps"),
        (lambda: ops.reconstruct(torch.ones(6, 4), [strided()], [1.0]), ValueError, r"terms\[0\].*gaps"),
        (lambda: ops.reconstruct(torch.ones(6, 4), [turned()], [1.0]), ValueError, r"terms\[0\].*another order"),
        (lambda: ops.reconstruct(turned(), [], [], out=torch.ones(6, 4)), ValueError, "out .*another order"),
        (lambda: ops.ema_update_([torch.ones(6, 4)], turned(), [0.5]), ValueError, r"emas\[0\].*another order"),
        (lambda: step([turned()], [turned()], [torch.ones(6, 4)]), ValueError, r"momentum buffer of .*another order"),
        (lambda: step([turned()], [turned()], None, [torch.ones(1, 6, 4)]), ValueError, r"ema of .*another order"),
        (lambda: ops.reconstruct(torch.ones(4), [torch.ones(5)], [1.0]), ValueError, "term of"),
        (lambda: ops.reconstruct(torch.ones(4), [], [1.0]), ValueError, "one tap each"),
        (lambda: ops.reconstruct(torch.ones(4), [torch.ones(4)] * 5, [1.0] * 5), ValueError, "0 to 4 terms"),
        (lambda: ops.reconstruct(torch.ones(4, dtype=torch.int32), [], []), TypeError, "floating point"),
        (lambda: ops.reconstruct(torch.eye(3).to_sparse(), [], []), TypeError, "sparse"),
        (lambda: ops.ema_update_([strided()], torch.ones(6, 4), [0.5]), ValueError, r"emas\[0\].*gaps"),
        (lambda: ops.ema_update_([torch.ones(4)], torch.ones(4), [1.5]), ValueError, r"decays\[0\]"),
        (lambda: ops.ema_update_([torch.ones(4)], torch.ones(4), [float("nan")]), ValueError, r"decays\[0\]"),
        (lambda: ops.ema_update_([], torch.ones(4), []), ValueError, "1 to 3 EMAs"),
        (lambda: ops.ema_update_([torch.ones(4)], torch.ones(4), [0.5], turn=0.5), ValueError, "couples two"),
        (lambda: ops.ema_update_([torch.ones(4), torch.ones(4)], torch.ones(4), [0.9, 0.9], turn=0.9), ValueError,
         "without bound"),
        (lambda: ops.ema_update_([torch.ones(4), torch.ones(4)], torch.ones(4), [0.9, 0.9], turn=float("nan")),
         ValueError, "without bound"),
        (lambda: step([strided()], [torch.ones(6, 4)]), ValueError, r"weights\[0\].*gaps"),
        (lambda: step([torch.ones(4)], []), ValueError, "1 weights but 0"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], [torch.ones(5)]), ValueError, "momentum"),
        (lambda: step([torch.ones(4)], [None]), ValueError, r"weights\[0\] has no gradient"),
        (lambda: step([torch.ones(4)], [torch.eye(2).to_sparse()]), TypeError, "gradient of .*sparse"),
        (lambda: step([torch.ones(4).long()], [torch.ones(4)]), TypeError, r"weights\[0\].*floating point"),
        (lambda: step([torch.ones(4), torch.ones(4).double()], [torch.ones(4)] * 2), ValueError, "different dev"),
        (lambda: step([MEMORY[:8], MEMORY[4:]], [torch.ones(8), torch.ones(6)]), ValueError, "share memory"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], None, [torch.zeros(1, 4).half()], options=PLAIN,
                      design=PastDesign(0, (0.5,), (0.0,))), ValueError, "EMAs of"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], masters=[torch.ones(4)]), ValueError, "master weights are for"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], options=SgdOptions(float("nan"))), ValueError, "lr is nan"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], design=PastDesign(delay=-1)), ValueError, "at least 0"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], design=PastDesign(update_tap=float("inf"))), ValueError, "tap"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], args=StepArguments(clock=torch.zeros(2))), ValueError, "clock"),
        (lambda: adam([torch.ones(4)], [torch.ones(4)], [torch.ones(4)], [torch.ones(4)], []), ValueError, "counts"),
        (lambda: adam([torch.ones(4)], [torch.ones(4)], [torch.ones(4)], [torch.ones(4)], [torch.tensor(0)]),
         ValueError, "step count of"),
        (lambda: adam(*[[torch.ones(4)]] * 4, [torch.tensor(0.0)]), ValueError, "share memory"),
        (lambda: adam([torch.ones(4)], [torch.ones(4)], [torch.ones(4)], [torch.ones(4)], [torch.tensor(0.0)],
                      options=AdamOptions(0.1, beta2=1.0)), ValueError, "beta2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_overlapping_output_is_refused() -> None:
    memory = torch.randn(10)
    with pytest.raises(ValueError, match="share memory"):
        ops.reconstruct(memory[:8], [], [], out=memory[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_input_leaves_everything_untouched(backend: str) -> None:
    good, bad = torch.ones(4), torch.ones(6)
    with pytest.raises(ValueError, match="gradient"):
        ops.sgd_step_([good, bad], [torch.ones(4), torch.ones(5)], options=PLAIN, backend=backend)
    assert torch.equal(good, torch.ones(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_require_gradients_are_stepped(backend: str) -> None:
    weight, velocity = torch.nn.Parameter(torch.ones(4)), torch.zeros(4)
    ops.sgd_step_(
        [weight], [torch.ones(4)], [velocity], options=SgdOptions(0.5, 0.9, weight_decay=1.0), backend=backend
    )
    assert weight.tolist() == [0.0] * 4
    assert velocity.grad_fn is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_of_another_number_are_refused(backend: str) -> None:
    weights, three = [torch.ones(4), torch.ones(4)], PastDesign(0, (0.5,) * 3, (0.0,) * 3)
    grads = [torch.ones(4)] * 2
    with pytest.raises(ValueError, match=r"ema of weights\[1\]"):
        step(weights, grads, None, [torch.zeros(3, 4), torch.zeros(1, 4)], design=three, backend=backend)
    with pytest.raises(ValueError, match="as many decays and taps"):
        step(weights, grads, None, None, design=three, backend=backend)
    assert torch.equal(weights[0], torch.ones(4))


def arguments(case: Case) -> tuple[object, ...]:
    """A case as the registered operator takes it."""
    arrays, grads = case.make()
    lists = (arrays.emas, arrays.pasts, arrays.masters, arrays.counts, arrays.previous)
    options, design = case.options(), case.design(delay=4)
    args = StepArguments(3, torch.tensor(2), torch.tensor(2.0), torch.tensor(0.0), 3.0, 5.0, torch.tensor(5.0))
    middle = (*options[1:], *design, *args, "auto")
    tail = (False,) if case.rule == "sgd" else ()
    states = arrays.states if case.rule == "sgd" else (*arrays.states, ())
    return (arrays.weights, grads, *states, *lists, 0.1, torch.tensor(0.1), *middle, *tail)


@pytest.mark.parametrize("case", [
    Case(sizes=(4, 9)), Case("adam", torch.bfloat16, sizes=(4, 9), master=True, previous=True),
], ids=str)  # fmt: skip
def test_steps_are_proper_operators(case: Case) -> None:
    operator = {"sgd": torch.ops.layerpipe.sgd_step_, "adam": torch.ops.layerpipe.adamw_step_}[case.rule]
    torch.library.opcheck(operator.default, arguments(case))


def test_averages_and_reconstruction_are_proper_operators() -> None:
    taps = torch.tensor([2.0])
    weight, term = torch.randn(4, 3), torch.randn(4, 3)
    torch.library.opcheck(torch.ops.layerpipe.ema_update_.default, ([weight], term, [0.5], 0, 0.0, "auto"))
    torch.library.opcheck(torch.ops.layerpipe.reconstruct.default, (weight, [term], [2.0], None, "auto"))
    torch.library.opcheck(torch.ops.layerpipe.reconstruct.default, (weight, [term], [], taps, "auto"))
    out = torch.empty_like(weight)
    torch.library.opcheck(torch.ops.layerpipe.reconstruct_.default, (out, weight, [term], [2.0], None, "auto"))


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_has_no_graph_break_and_the_same_bits(rule: str, compiler: str) -> None:
    case = Case(rule, emas=2, sizes=(7, 64))
    arrays, grads = case.make()

    def train(a: Arrays, g: list[Tensor]) -> None:
        rest = {"emas": a.emas, "pasts": a.pasts, "options": case.options(), "design": case.design()}
        if rule == "sgd":
            ops.sgd_step_(a.weights, g, *a.states, **rest)
        else:
            ops.adamw_step_(a.weights, g, *a.states, a.counts, **rest)

    eager, compiled = cloned(arrays), cloned(arrays)
    train(eager, grads)
    torch.compile(train, fullgraph=True, backend=compiler)(compiled, grads)
    assert all(map(torch.equal, eager.written(), compiled.written()))


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_counts_what_it_writes_in_the_tensors_versions(rule: str, backend: str) -> None:
    case = Case(rule, sizes=(5,))
    arrays, grads = case.make()
    before = [t._version for t in arrays.written()]
    options, design = case.options(), case.design()
    if rule == "sgd":
        ops.sgd_step_(arrays.weights, grads, *arrays.states, arrays.emas, arrays.pasts, options=options, design=design,
                      backend=backend)  # type: ignore[arg-type]  # fmt: skip
    else:
        ops.adamw_step_(arrays.weights, grads, *arrays.states, arrays.counts, arrays.emas, arrays.pasts,
                        options=options, design=design, backend=backend)  # type: ignore[arg-type]  # fmt: skip
    assert all(t._version > b for t, b in zip(arrays.written(), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reconstruct_takes_narrow_terms_masters_and_taps_in_a_tensor(backend: str, dtype: torch.dtype) -> None:
    master, velocity = torch.randn(1000), torch.randn(1000)
    ema = torch.randn(1000).bfloat16()
    out = torch.full((1000,), float("nan"), dtype=dtype)
    ops.reconstruct(master, [velocity, ema], [0.5, -2.0], out=out, backend=backend)
    want = master + 0.5 * velocity - 2.0 * ema.float()
    torch.testing.assert_close(out, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    again = ops.reconstruct(master, [velocity, ema], torch.tensor([0.5, -2.0]), backend=backend)
    torch.testing.assert_close(again, want)


def test_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERPIPE_BACKEND", "reference")
    assert backends.choose(torch.ones(1)) == "reference"
    monkeypatch.setenv("LAYERPIPE_BACKEND", "magic")
    with pytest.raises(ValueError, match="LAYERPIPE_BACKEND='magic'"):
        backends.choose(torch.ones(1))


def test_missing_forced_backend_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_C", None)
    assert backends.choose(torch.ones(1)) == "reference"
    assert lk.available_backends() == ("reference",)
    with pytest.raises(RuntimeError, match="compiler"):
        backends.choose(torch.ones(1), "cpp")


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpp"])
def test_a_backend_refuses_what_it_has_no_kernel_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_built", lambda _: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"backend='{backend}' takes"):
        backends.choose(torch.ones(1, dtype=torch.float64, device="meta"), backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_missing_gpu_backend_says_how_to_get_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_built", lambda _: False)
    with pytest.raises(RuntimeError, match="nvcc" if backend == "cuda" else "pip install triton"):
        backends.choose(torch.ones(1), backend)


@pytest.mark.parametrize(
    ("architectures", "gpu", "fits"),
    [
        ("80-real 90-real 100", (8, 0), True),
        ("80-real 90-real 100", (8, 9), True),  # machine code of its generation
        ("80-real 90-real 100", (9, 0), True),
        ("80-real 90-real 100", (12, 0), True),  # PTX
        ("80-real 90-real 100", (7, 5), False),
        ("90", (8, 0), False),
        ("86-real", (8, 0), False),
        ("90a", (10, 0), False),
        ("90a-virtual", (9, 0), True),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
        ("80-virtual", (9, 0), True),
        ("native", (7, 5), True),
    ],
)
def test_a_gpu_that_the_kernels_were_not_built_for_gets_tritons(
    architectures: str, gpu: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension = SimpleNamespace(CUDA=1, build_info=lambda: {"cuda_architectures": architectures})
    monkeypatch.setattr(backends, "_C", extension)
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "this GPU")
    monkeypatch.setattr(backends, "_has_code_for", backends._has_code_for.__wrapped__)  # it remembers
    weights: Any = SimpleNamespace(is_cpu=False, is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    assert backends.choose(weights) == ("cuda" if fits else "triton")
    if not fits:
        with pytest.raises(RuntimeError, match=f"built for {architectures} and this GPU is none of these"):
            backends.choose(weights, "cuda")


def test_build_info_says_what_is_there() -> None:
    info = lk.build_info()
    assert info["backends"] == list(lk.available_backends())
    assert info["extension"] == ("cpp" in info["backends"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_taps_in_a_tensor_may_lie_anywhere_in_memory_and_are_a_vector(backend: str) -> None:
    weight, terms = torch.zeros(8), [torch.ones(8), torch.full((8,), 10.0)]
    for taps in (torch.tensor([[1.0, 100.0], [2.0, 200.0]])[:, 0], torch.tensor([1.0, 2.0])):
        assert torch.equal(ops.reconstruct(weight, terms, taps, backend=backend), torch.full((8,), 21.0))
    assert torch.equal(
        ops.reconstruct(weight, terms, torch.tensor(2.0).expand(2), backend=backend), torch.full((8,), 22.0)
    )
    with pytest.raises(ValueError, match=r"taps must be a vector, got a tensor of shape \(2, 1\)"):
        ops.reconstruct(weight, terms, torch.ones(2, 1), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_learning_rate_and_a_scale_of_one_element_have_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    weights, lr, scale = [torch.ones(()), torch.ones(3)], torch.full(shape, 0.5), torch.full(shape, 2.0)
    grads = [torch.ones(()), torch.ones(3)]
    ops.sgd_step_(weights, grads, options=SgdOptions(lr=lr), args=StepArguments(grad_scale=scale), backend=backend)
    assert all(torch.equal(w, torch.full_like(w, 0.75)) for w in weights)
