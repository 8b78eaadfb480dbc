"""Tests of fedraclora.plan."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.local import LocalConfig
from fedraclora.plan import MOMENTS, RoundPlan

names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
locals_ = st.builds(
    LocalConfig,
    optimizer=st.sampled_from(["sgd", "adamw"]),
    lr=st.floats(1e-6, 10),
    momentum=st.floats(0, 0.99),
    weight_decay=st.floats(0, 1),
    steps=st.integers(1, 100),
    batch_size=st.integers(1, 512),
    proximal=st.floats(0, 1),
    clip_norm=st.floats(0, 10),
)


@st.composite
def plans(draw: st.DrawFn) -> RoundPlan:
    trained = draw(st.dictionaries(names, st.sampled_from(["a", "b", "ab"]), max_size=4))
    dense = draw(st.lists(names, unique=True, min_size=0 if trained else 1, max_size=3))
    return RoundPlan(
        round=draw(st.integers(0, 10**6)),
        trained=trained,
        dense=tuple(dense),
        local=draw(locals_),
        moments=draw(st.sampled_from(MOMENTS)),
        batch_seed=draw(st.integers(0, 2**63 - 1)),
    )


@given(plan=plans())
def test_a_plan_survives_its_record(plan: RoundPlan) -> None:
    restored = RoundPlan.from_record(plan.to_record())
    assert restored == plan
    assert list(restored.trained) == list(plan.trained)
    assert RoundPlan.from_record(json.loads(json.dumps(plan.to_record()))) == plan


@given(plan=plans())
def test_a_record_holds_scalars_and_lists_of_scalars_only(plan: RoundPlan) -> None:
    for value in plan.to_record().values():
        items = value if isinstance(value, list) else [value]
        assert len({type(item) for item in items}) <= 1
        assert all(type(item) in (int, float, str, bool) for item in items)


def test_a_record_may_hold_more_than_the_plan() -> None:
    plan = RoundPlan(1, {"fc1": "b"})
    assert RoundPlan.from_record({**plan.to_record(), "links": "{}", "start_state": 3}) == plan


@pytest.mark.parametrize("name", ["round", "layers", "local.lr"])
def test_a_missing_field_is_named(name: str) -> None:
    record = RoundPlan(1, {"fc1": "b"}).to_record()
    del record[name]
    with pytest.raises(KeyError, match=name):
        RoundPlan.from_record(record)


def test_factors_are_listed_in_the_order_in_which_they_are_sent() -> None:
    plan = RoundPlan(1, {"fc2": "ab", "fc1": "b", "conv": "a"})
    assert plan.factors == ["fc2.lora_a", "fc2.lora_b", "fc1.lora_b", "conv.lora_a"]


def test_plans_that_nobody_can_carry_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moments='keep' is unknown; valid: reset, carry, transport"):
        RoundPlan(1, {"fc1": "b"}, moments="keep")
    with pytest.raises(ValueError, match=r"found \{'fc1': 'ba'\}"):
        RoundPlan(1, {"fc1": "ba", "fc2": "b"})
    with pytest.raises(ValueError, match="found nothing"):
        RoundPlan(1)
