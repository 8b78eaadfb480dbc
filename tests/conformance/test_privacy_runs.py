"""Privacy through the whole stack: what clients send is clipped, what is merged is noisy, and epsilon is accounted."""

from itertools import pairwise

import dp_accounting
import numpy as np
import pandas as pd
import pytest
import torch
from dp_accounting import rdp
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from scipy import stats

from experiments.run import run
from experiments.settings import PrivacySettings
from tests.helpers import Silent, error_reply, federation, settings, spoil

CLIP, NOISE, DELTA = 0.05, 1.5, 1e-5


def private(**changes):
    fields = {"level": "client", "clip": CLIP, "noise": NOISE, "delta": DELTA}
    own = {name: changes.pop(name) for name in list(changes) if name in PrivacySettings.__dataclass_fields__}
    return settings(privacy=PrivacySettings(**{**fields, **own}), **{"rank": 8, "lr": 2.0, **changes})


def flat(link):
    return torch.cat([term.lora_b.reshape(-1) for term in link.low_rank_terms().values()]).double().numpy()


def sent(parts, round):
    """Return what each client sent in a round, flat."""
    return {
        part: reply.content.array_records["update"]["flat"].numpy().astype(np.float64)
        for way, part, reply in parts.grid.seen
        if way == "up" and reply.metadata.group_id == str(round) and not reply.has_error()
        and "update" in reply.content.array_records
    }  # fmt: skip


def test_no_update_is_longer_than_the_clip_and_most_are_as_long():
    parts = federation(private(rounds=2))
    parts.run()
    norms = [np.linalg.norm(update) for round in (1, 2) for update in sent(parts, round).values()]
    assert len(norms) == 6
    assert max(norms) <= CLIP * (1 + 1e-6)
    assert min(norms) > 0.99 * CLIP, "the clip binds here"


def test_what_is_merged_is_the_uniform_mean_with_noise_of_the_stated_deviation():
    """The noise on each coordinate is N(0, (z C / K)^2): its scaled sum of squares is a chi-square variable."""
    parts = federation(private(rounds=3))
    parts.run()
    size = parts.settings.num_clients // 2
    noise = np.concatenate(
        [flat(link) - sum(sent(parts, round).values()) / size for round, link in enumerate(parts.chain.links, start=1)]
    )
    scaled = noise / (NOISE * CLIP / size)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], len(scaled))
    assert low < np.square(scaled).sum() < high
    assert abs(scaled.mean()) < 4 / len(scaled) ** 0.5


def test_one_failed_client_does_not_void_a_round_and_the_mean_is_still_over_the_cohort():
    parts = federation(private(rounds=2, noise=0.0))
    victim = parts.strategy._cohort(2)[0]
    parts = federation(private(rounds=2, noise=0.0), fault=spoil(error_reply, victim, only_round=2))
    report = parts.run()[-1]
    assert (report.num_failed, report.is_updated) == (1, True)
    updates = sent(parts, 2)
    assert len(updates) == 2
    np.testing.assert_allclose(flat(parts.chain.links[1]), sum(updates.values()) / 3, rtol=1e-5, atol=1e-9)


def test_epsilon_in_the_table_is_that_of_the_library_called_directly(tmp_path):
    run(private(rounds=3, out=str(tmp_path / "run")), Silent())
    found = pd.read_csv(tmp_path / "run" / "rounds.csv")["epsilon"].tolist()[1:]
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    # Replacing a client moves the sum by 2 C, so the noise is z / 2 in units of the sensitivity.
    event = dp_accounting.SampledWithoutReplacementDpEvent(6, 3, dp_accounting.GaussianDpEvent(NOISE / 2))
    expected = [accountant.compose(event).get_epsilon(DELTA) for _ in range(3)]
    plain = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    bounds = [plain.compose(dp_accounting.GaussianDpEvent(NOISE / 2)).get_epsilon(DELTA) for _ in range(3)]
    np.testing.assert_allclose(found, np.minimum(expected, bounds), rtol=1e-6)


def test_epsilon_of_examples_is_that_of_the_worst_client(tmp_path):
    chosen = private(rounds=2, level="example", out=str(tmp_path / "run"), fraction=1.0, local_steps=3, batch_size=8)
    run(chosen, Silent())
    counts = pd.read_csv(tmp_path / "run" / "label_counts.csv").drop(columns="partition").sum(axis=1)
    smallest = int(counts.min())
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    step = dp_accounting.SampledWithoutReplacementDpEvent(smallest, 8, dp_accounting.GaussianDpEvent(NOISE / 2))
    expected = accountant.compose(step, 6).get_epsilon(DELTA)
    assert pd.read_csv(tmp_path / "run" / "rounds.csv")["epsilon"].iloc[-1] == pytest.approx(expected, rel=1e-6)


def test_an_adaptive_clip_follows_the_median_norm():
    """C exp(-eta (share within C - 1/2)), by the norms that the clients had before clipping."""
    parts = federation(private(rounds=6, clip=5.0, adaptive=True, noise=0.0, count_noise=0.0, clip_lr=1.0))
    clips = [report.clip for report in parts.run()[1:]]
    assert clips[:3] == pytest.approx(5.0 * np.exp([0.0, -0.5, -1.0])), "all updates are shorter than 3"
    for round, (clip, after) in enumerate(pairwise(clips), start=1):
        longest = [np.linalg.norm(update) < 0.999 * clip for update in sent(parts, round).values()]
        assert after == pytest.approx(clip * np.exp(0.5 - np.mean(longest)))


def test_the_same_seed_gives_the_same_noise_in_simulation_and_a_deployment_does_not():
    same = [federation(private(rounds=2)) for _ in range(2)]
    assert len({parts.run() and parts.chain.digest for parts in same}) == 1
    problem = same[0].problem
    deployed = [federation(private(rounds=2), problem=problem) for _ in range(2)]
    for parts in deployed:
        object.__setattr__(parts.strategy.settings, "is_deployed", True)
    assert len({parts.run() and parts.chain.digest for parts in deployed}) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 3),
        lambda inner: DifferentialPrivacyClientSideFixedClipping(inner, 1.0, 1.0, 3),
        lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(inner, 1.0, 3, clipped_count_stddev=1.0),
        lambda inner: DifferentialPrivacyClientSideAdaptiveClipping(inner, 1.0, 3, clipped_count_stddev=1.0),
    ],
)
def test_flowers_own_privacy_wrappers_are_refused_with_our_settings_named(wrap):
    parts = federation(settings())
    with pytest.raises(RuntimeError, match=r"privacy\.level"):
        wrap(parts.strategy).start(parts.grid, ArrayRecord({"w": Array(np.zeros(1))}), num_rounds=1)


def test_arrays_that_a_mod_has_changed_are_refused_with_our_settings_named():
    def noisy(reply):
        values = reply.content.array_records["update"]["flat"].numpy() + 0.1
        reply.content["update"] = ArrayRecord({"flat": Array(values)})
        return reply

    parts = federation(settings(fraction=1.0), fault=spoil(noisy, 2, only_round=1))
    assert "privacy.level" in parts.run()[1].failures[2]
