"""Stages measured on a GPU, whose calls return before their work is done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerpipe.partition.profile import TimedCut, seconds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_stage_is_measured_by_its_work_and_not_by_its_launches() -> None:
    light = nn.Linear(4096, 16).cuda()
    heavy = nn.Sequential(nn.Linear(16, 8192), nn.Linear(8192, 8192)).cuda()
    x = torch.randn(8192, 4096, device="cuda")
    [(lightly, heavily)] = [[sum(times) for times in stages] for stages in seconds([TimedCut([light, heavy], [x])])]
    assert heavily > 5 * lightly  # 3.3e12 operations against 3e9
