"""What a client of another rank is asked, and what a round's plan says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.chain import Chain
from fedraclora.link import Link, LowRank, Zero, materialize, product
from fedraclora.local_config import LocalConfig
from fedraclora.plan import NO_SEED, RoundPlan, Sending, Training
from fedraclora.privacy import Privacy
from fedraclora.sketch import SketchKey
from strategies.asking import link_of_rank, plan_round, view_for
from strategies.rounds import RoundSettings

LIKE = torch.zeros((), dtype=torch.float64)
KEY = SketchKey("orthonormal", 1, 0, "fc1", "b", 4, 9)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@given(st.integers(0, 6), st.none() | st.floats(0.5, 8))
def test_a_clients_view_is_the_first_components_of_the_product_in_its_own_scale(rank, alpha):
    """Layers have ranks of their own: a client's is no larger than any of theirs."""
    terms = (
        LowRank("fc1", 1.5, random(4, 9), random(6, 4)),
        LowRank("fc2", 0.5, random(2, 6), random(3, 2)),
    )  # fmt: skip
    link = Link(0, terms)
    found = link_of_rank(link, rank, alpha).low_rank_terms()
    for term in terms:
        own, size = found[term.layer], min(rank or 9, term.lora_a.shape[0])
        cut = LowRank(term.layer, term.scale, term.lora_a[:size], term.lora_b[:, :size])
        torch.testing.assert_close(product(own, LIKE), product(cut, LIKE), rtol=1e-12, atol=1e-12)
        assert own.scale == (term.scale if alpha is None or not rank else alpha / size)
        assert torch.equal(own.lora_a, cut.lora_a)


def test_a_view_of_a_smaller_rank_draws_the_first_rows_and_has_a_version_of_its_own():
    chain = Chain.start({"fc1.weight": random(6, 9)})
    chain.open_link(Link(0, (LowRank("fc1", 1.0, KEY, Zero((6, 4))),)))
    plan = RoundPlan(1, Training({"fc1": "b"}))
    whole, small = (view_for(chain, plan, rank=rank, alpha=None) for rank in (0, 3))
    assert whole.version == chain.digest != small.version
    assert (whole.ranks, small.ranks) == ({}, {"fc1": 3})
    drawn = [materialize(view.link.factors["fc1.lora_a"], LIKE) for view in (whole, small)]
    assert torch.equal(drawn[0][:3], drawn[1])
    assert small.manifest.shapes == {"update": {"fc1.lora_b": (6, 3)}}


# ---- plans


def rounds(privacy=None, *, is_deployed=False):
    return RoundSettings(
        num_clients=4, fraction=1.0, local=LocalConfig(), seed=5, privacy=privacy, is_deployed=is_deployed,
        sending=Sending(codec='["sign",{}]'),
    )  # fmt: skip


def test_a_plan_has_the_rounds_own_batches_and_the_runs_way_of_sending():
    first, again, second = (plan_round(round, Training({"fc1": "b"}), rounds(), None) for round in (1, 1, 2))
    assert first == again
    assert first.batch_seed != second.batch_seed
    assert first.sending == rounds().sending
    assert (first.example_clip, first.example_noise, first.noise_seed) == (0.0, 0.0, NO_SEED)


@pytest.mark.parametrize(("clip", "expected"), [(None, 2.0), (0.7, 0.7)])
def test_clients_privacy_clips_the_update_by_the_current_bound_and_adds_no_noise_at_the_client(clip, expected):
    plan = plan_round(1, Training({"fc1": "b"}), rounds(Privacy("client", 2.0, 1.0, 1e-5)), clip)
    assert plan.sending == Sending(codec='["sign",{}]', clip=expected)
    assert (plan.example_clip, plan.example_noise, plan.noise_seed) == (0.0, 0.0, NO_SEED)


def test_examples_privacy_is_the_clients_own_work_with_seeded_noise_in_simulations_only():
    privacy = Privacy("example", 2.0, 1.5, 1e-5)
    simulated, other = (plan_round(round, Training({"fc1": "b"}), rounds(privacy), None) for round in (1, 2))
    assert (simulated.example_clip, simulated.example_noise, simulated.sending.clip) == (2.0, 1.5, 0.0)
    assert simulated.noise_seed not in (NO_SEED, other.noise_seed, simulated.batch_seed)
    assert plan_round(1, Training({"fc1": "b"}), rounds(privacy, is_deployed=True), None).noise_seed == NO_SEED
