"""Tensors of more elements than 32 bits count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerpipe_kernels import ops
from layerpipe_kernels.options import PastDesign, SgdOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNT = 2**31 + 12_345
#: Around the beginning, the 2^31st element and the end, none of them at a multiple of a pack.
PARTS = (slice(0, 1001), slice(2**31 - 503, 2**31 + 502), slice(COUNT - 1003, COUNT))


def filled(dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    made = torch.empty(COUNT, dtype=dtype, device="cuda")
    for part in made.split(2**28):
        part.normal_(generator=generator)
    return made


@pytest.fixture(autouse=True)
def _enough_memory() -> None:
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("needs 48 GB of free memory")


def test_a_step_of_a_large_tensor_is_that_of_its_parts(backend: str) -> None:
    weight, grad = filled(torch.bfloat16, 1), filled(torch.bfloat16, 2)
    velocity, ema = filled(torch.float32, 3), filled(torch.float32, 4)[None]
    past = torch.full_like(weight, float("nan"))
    options, design = SgdOptions(0.1, 0.9), PastDesign(4, (0.5,), (2.0,), 0.5)
    wants = []
    for part in PARTS:
        small = [t[part].clone() for t in (weight, grad, velocity, ema[0], past)]
        ops.sgd_step_(
            [small[0]], [small[1]], [small[2]], [small[3][None]], [small[4]], options=options, design=design,
            backend=backend,
        )  # fmt: skip
        wants.append(small)
    ops.sgd_step_([weight], [grad], [velocity], [ema], [past], options=options, design=design, backend=backend)
    for part, want in zip(PARTS, wants, strict=True):
        for got, expected in zip((weight, grad, velocity, ema[0], past), want, strict=True):
            assert torch.equal(got[part], expected)
    assert not past.isnan().any()


def test_the_past_weights_and_averages_of_a_large_tensor(backend: str) -> None:
    weight, term = filled(torch.bfloat16, 1), filled(torch.float32, 2)
    out = ops.reconstruct(weight, [term], [0.5], backend=backend)
    for part in PARTS:
        assert torch.equal(
            out[part], ops.reconstruct(weight[part].clone(), [term[part].clone()], [0.5], backend=backend)
        )
    wants = [term[part].clone() for part in PARTS]
    for want, part in zip(wants, PARTS, strict=True):
        ops.ema_update_([want], weight[part].clone(), [0.75], backend=backend)
    ops.ema_update_([term], weight, [0.75], backend=backend)
    assert all(torch.equal(term[part], want) for want, part in zip(wants, PARTS, strict=True))
