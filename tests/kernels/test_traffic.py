from __future__ import annotations

import pytest
import torch

from layerpipe_kernels.traffic import Traffic

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("traffic", "separate", "one"),
    [
        (Traffic(), 44, 32),
        (Traffic(past=False), 32, 28),
        (Traffic(states=2), 52, 40),
        (Traffic(average=BF16, emas=2), 48, 32),
        (Traffic(states=1, emas=0, past=False), 20, 20),
        (Traffic(states=2, emas=0, past=False), 28, 28),
    ],
)
def test_bytes_are_those_of_the_published_table(traffic: Traffic, separate: int, one: int) -> None:
    assert (traffic.separate_passes(), traffic.one_pass()) == (separate, one)


def test_prediction_reads_and_writes_the_last_update() -> None:
    for traffic in (Traffic(), Traffic(weight=BF16, grad=BF16, master=True)):
        assert traffic._replace(previous=True).one_pass() == traffic.one_pass() + 8
    assert Traffic(states=0, emas=0, past=False, previous=True).one_pass() == 20  # of a given direction


def test_two_bfloat16_averages_cost_what_one_of_float32_costs() -> None:
    assert Traffic(average=BF16, emas=2).one_pass() == Traffic(emas=1).one_pass()


def test_a_master_replaces_the_read_of_the_rounded_weights() -> None:
    half = Traffic(weight=BF16, grad=BF16, states=1, emas=0, past=False)
    assert half.one_pass() == 2 + 2 + 2 + 8
    assert half._replace(master=True).one_pass() == 2 + 2 + 8 + 8
