"""Tests of fedraclora.plan."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.local import LocalConfig
from fedraclora.plan import FEEDBACKS, MEMORIES, MOMENTS, PARTS, RoundPlan, Sending, Training

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
def trainings(draw: st.DrawFn) -> Training:
    parts = draw(st.dictionaries(names, st.sampled_from(sorted(PARTS)), max_size=4))
    dense = draw(st.lists(names, unique=True, min_size=0 if parts else 1, max_size=3))
    keys = Training(parts, tuple(dense)).keys
    return Training(
        parts,
        tuple(dense),
        private=tuple(draw(st.lists(st.sampled_from(keys), unique=True)) if keys else ()),
        projects=draw(st.booleans()),
        sends_factor=draw(st.booleans()),
        blocks=draw(st.integers(1, 5)),
        block_steps=draw(st.integers(1, 9)),
        moments=draw(st.sampled_from(MOMENTS)),
    )


sendings = st.builds(
    Sending,
    codec=st.text(max_size=20),
    feedback=st.sampled_from(FEEDBACKS),
    memory=st.sampled_from(MEMORIES),
    clip=st.floats(0, 10),
    variates=st.booleans(),
)
plans = st.builds(
    RoundPlan,
    round=st.integers(0, 10**6),
    training=trainings(),
    local=locals_,
    sending=sendings,
    batch_seed=st.integers(0, 2**63 - 1),
    noise_seed=st.integers(-1, 2**63 - 1),
    example_clip=st.floats(0, 10),
    example_noise=st.floats(0, 10),
)
PLAN = RoundPlan(1, Training({"fc1": "b"}))


@given(plan=plans)
def test_a_plan_survives_its_record(plan: RoundPlan) -> None:
    restored = RoundPlan.from_record(plan.to_record())
    assert restored == plan
    assert list(restored.training.parts) == list(plan.training.parts)
    assert RoundPlan.from_record(json.loads(json.dumps(plan.to_record()))) == plan


@given(plan=plans)
def test_a_record_holds_scalars_and_lists_of_scalars_only(plan: RoundPlan) -> None:
    for value in plan.to_record().values():
        items = value if isinstance(value, list) else [value]
        assert len({type(item) for item in items}) <= 1
        assert all(type(item) in (int, float, str, bool) for item in items)


def test_a_record_may_hold_more_than_the_plan() -> None:
    assert RoundPlan.from_record({**PLAN.to_record(), "links": "{}", "start_state": 3}) == PLAN


@pytest.mark.parametrize("name", ["round", "layers", "local.lr", "sending.codec", "training.blocks"])
def test_a_missing_field_is_named(name: str) -> None:
    record = PLAN.to_record()
    del record[name]
    with pytest.raises(KeyError, match=name):
        RoundPlan.from_record(record)


def test_what_trains_is_listed_by_layer_and_what_is_sent_leaves_out_what_is_private() -> None:
    training = Training(
        {"fc2": "ab", "fc1": "b", "conv": "a", "mid": "core", "out": "w"}, ("out.bias",), ("fc2.lora_b",)
    )
    factors = ["fc2.lora_a", "fc2.lora_b", "fc1.lora_b", "conv.lora_a", "mid.core"]
    assert training.keys == [*factors, "out.weight"]
    assert training.full == ("out",)
    assert training.sent_factors({}) == [key for key in factors if key != "fc2.lora_b"]
    assert training.sent_dense == ["out.weight", "out.bias"]


def test_a_weight_trained_in_full_may_be_sent_as_the_factor_beside_the_drawn_one() -> None:
    training = Training({"fc1": "w", "fc2": "b"}, ("fc1.bias",), sends_factor=True)
    assert training.sent_factors({"fc1": "lora_a"}) == ["fc2.lora_b", "fc1.lora_a"]
    assert training.sent_dense == ["fc1.bias"]


@pytest.mark.parametrize(
    ("plan", "keeps"),
    [
        (PLAN, False),
        (RoundPlan(1, Training({"fc1": "b"}, moments="carry")), True),
        (RoundPlan(1, Training({"fc1": "b"}, moments="keep")), True),
        (RoundPlan(1, Training({"fc1": "ab"}, private=("fc1.lora_b",))), True),
        (RoundPlan(1, Training({"fc1": "b"}), sending=Sending(codec="x", feedback="ef")), True),
        (RoundPlan(1, Training({"fc1": "b"}), sending=Sending(variates=True)), True),
        (RoundPlan(1, Training({"fc1": "b"}), sending=Sending(codec="x", clip=1.0)), False),
    ],
)
def test_a_client_keeps_state_only_where_the_plan_counts_on_it(plan: RoundPlan, *, keeps: bool) -> None:
    assert plan.keeps_state == keeps


def test_second_moments_go_on_under_keep_alone() -> None:
    found = [mode for mode in MOMENTS if Training({"fc1": "b"}, moments=mode).keeps_second_moments]
    assert found == ["keep"]


def test_plans_that_nobody_can_carry_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moments='kept' is unknown; valid: reset, carry, transport, keep"):
        Training({"fc1": "b"}, moments="kept")
    with pytest.raises(ValueError, match=r"found \{'fc1': 'ba'\}"):
        Training({"fc1": "ba", "fc2": "b"})
    with pytest.raises(ValueError, match="found nothing"):
        Training()
    with pytest.raises(ValueError, match=r"private=\['fc1.lora_a'\] must be among what trains"):
        Training({"fc1": "b"}, private=("fc1.lora_a",))
    with pytest.raises(ValueError, match="blocks=0"):
        Training({"fc1": "b"}, blocks=0)
    with pytest.raises(ValueError, match="feedback='ef22' is unknown"):
        Sending(feedback="ef22")
    with pytest.raises(ValueError, match="a clip of -1"):
        Sending(clip=-1.0)
