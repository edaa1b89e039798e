"""The kinds of past weights as values and as strings."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import layerpipe_kernels as lk

SPELLED = [
    ("blend", lk.Blend()),
    ("blend:order=3:decay=coupled", lk.Blend(order=3, decay="coupled")),
    ("blend:decay=0.5+0.8", lk.Blend(decay=(0.5, 0.8))),
    ("blend:order=1:decay=matched", lk.Blend(order=1, decay="matched")),
    ("blend:order=1:decay=0.3", lk.Blend(order=1, decay=(0.3,))),
    (
        "blend:dtype=bfloat16:norm=match:materialize=true:seed=7",
        lk.Blend(dtype=torch.bfloat16, norm="match", materialize=True, seed=7),
    ),
    ("ema:decay=window:norm=match", lk.EMA(decay="window", norm="match")),
    ("ema:of=gradient", lk.EMA(of="gradient")),
    ("momentum:materialize=true", lk.Momentum(materialize=True)),
    ("latest:norm=match", lk.Latest(norm="match")),
    ("stash", lk.Stash()),
]


@pytest.mark.parametrize(("text", "value"), SPELLED, ids=[text for text, _ in SPELLED])
def test_a_string_and_a_value_are_the_same_kind(text: str, value: lk.Past) -> None:
    assert lk.past.parse(text) == value
    assert str(value) == text
    assert lk.past.parse(value) is value
    assert eval(repr(value), {**vars(lk), "torch": torch}) == value
    for copied in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert copied == value
        assert hash(copied) == hash(value)


def test_every_decay_is_spelled_to_the_last_bit() -> None:
    for decay in (1 / 3, 0.1 + 0.2, 1e-300, 5 / 7):
        assert lk.past.parse(str(lk.EMA(decay=decay))) == lk.EMA(decay=decay)


def test_a_default_is_not_spelled_and_a_decay_that_is_a_function_cannot_be() -> None:
    assert str(lk.past.parse("blend:order=2:materialize=false")) == "blend"
    assert lk.past.option(lk.Blend(order=3)) == "blend:order=3"
    value = lk.EMA(decay=lk.decay.matched)
    assert lk.past.option(value) is value
    assert str(value) == "ema:decay=matched"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.Blend(order=4), "order must be 1, 2 or 3"),
        (lambda: lk.Blend(order=True), "order must be 1, 2 or 3"),
        (lambda: lk.Blend(decay="matched"), "designs its decays"),
        (lambda: lk.Blend(decay=(0.5, 0.8, 0.9)), "order=2 takes 2 decays, got decay"),
        (lambda: lk.Blend(decay=(0.5, 1.0)), r"decay must be in \[0, 1\)"),
        (lambda: lk.Blend(order=1, decay="coupled"), "couples two EMAs"),
        (lambda: lk.EMA(decay="fast"), "decay='fast' is unknown"),
        (lambda: lk.EMA(decay=(0.1, 0.2)), "one EMA and one decay"),  # type: ignore[arg-type]
        (lambda: lk.EMA(decay=None), "a rule's name, a number or a function"),  # type: ignore[arg-type]
        (lambda: lk.EMA(of="loss"), "of='update' or of='gradient'"),
        (lambda: lk.EMA(of="gradient", materialize=True), "needs an EMA of='update'"),
        (lambda: lk.EMA(dtype=torch.float16), "dtype of past='ema' must be torch.float32 or torch.bfloat16"),
        (lambda: lk.Latest(norm="same"), "norm of past='latest' must be None or 'match'"),
        (lambda: lk.Momentum(materialize=1), "materialize of past='momentum' must be True or False"),  # type: ignore[arg-type]
        (lambda: lk.Blend(seed=None), "seed of past='blend' must be a whole number"),  # type: ignore[arg-type]
        (lambda: lk.past.parse("yesterday"), "past='yesterday' is unknown; there are: stash, latest, ema"),
        (lambda: lk.past.parse("stash:order=2"), "stash has no option 'order'; it has none"),
        (lambda: lk.past.parse("latest:order=2"), "latest has no option 'order'; it has norm"),
        (lambda: lk.past.parse("blend:order"), "order cannot be ''"),
        (lambda: lk.past.parse("blend:order=two"), "order cannot be 'two'"),
        (lambda: lk.past.parse("blend:dtype=float16"), "dtype cannot be 'float16'"),
        (lambda: lk.past.parse("blend:order=2:order=3"), "has order twice"),
        (lambda: lk.past.parse("blend:order=7"), "past='blend:order=7': order must be 1, 2 or 3"),
        (lambda: lk.past.parse(3), "past must be a name or a value"),  # type: ignore[arg-type]
    ],
)
def test_what_a_kind_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def wrapped(params: Any, **options: Any) -> lk.PastWeights:
    return lk.PastWeights(torch.optim.SGD(params, lr=0.1), **options)


@pytest.mark.parametrize("make", [lk.SGD, lk.Adam, lk.AdamW, lk.SOAP, lk.Muon, lk.Lamb, wrapped])
def test_groups_and_checkpoints_have_the_spelling(make: Any, tmp_path: Any) -> None:
    params = [torch.zeros(4, 4, requires_grad=True) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "past": lk.Stash()}]
    optimizer = make(groups, delay=2, past=lk.Blend(order=3))
    assert [group["past"] for group in optimizer.param_groups] == ["blend:order=3", "stash"]
    optimizer.param_groups[0]["past"] = lk.EMA(decay=0.25)
    for param in params:
        param.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.param_groups[0]["past"] == "ema:decay=0.25"
    assert [len(optimizer.state[p].get(key, ())) for p, key in zip(params, ("ema", "stash"), strict=True)] == [1, 2]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = make([{"params": params[:1]}, {"params": params[1:]}], delay=2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [group["past"] for group in other.param_groups] == ["ema:decay=0.25", "stash"]


@pytest.mark.parametrize("make", [lk.SGD, lk.Adam, lk.AdamW, lk.SOAP, lk.Muon, lk.Lamb, wrapped])
def test_an_option_that_there_is_not_is_refused_as_by_every_function(make: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'ema_decay'"):
        make([torch.zeros(3, requires_grad=True)], delay=2, ema_decay="matched")
