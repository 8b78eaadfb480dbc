"""The reconstructed counterexample: who arrives, who cannot, and who diverges."""

import numpy as np
import pytest

from experiments.paper.counterexample import (
    ARRIVED,
    CURVATURE,
    METHODS,
    PROBLEMS,
    SMOOTHNESS,
    STEPS,
    checkpoints,
    claims,
    curves,
    gap_figure,
    gaps,
    outcome_rows,
    outcomes,
    rank_one_floor,
)

SEEDS, NUM_STEPS = 6, 1000


@pytest.fixture(scope="module")
def frame():
    return gaps(SEEDS, NUM_STEPS)


def last(frame, method, step):
    rows = frame[(frame["method"] == method) & (frame["step"] == step) & (frame["iteration"] == NUM_STEPS)]
    return rows["gap"].to_numpy()


def test_every_run_is_there(frame):
    num_runs = len(METHODS) * len(STEPS) * len(PROBLEMS) * SEEDS
    assert len(frame) == num_runs * len(checkpoints(NUM_STEPS))
    assert checkpoints(NUM_STEPS)[0] == 0
    assert checkpoints(NUM_STEPS)[-1] == NUM_STEPS


def test_the_initial_gap_is_that_of_the_start(frame):
    """With b = ones and W^0 = 0 the gap is (1/4) b^T M^-1 b = (1/10 + 8) / 4."""
    at_zero = frame[(frame["iteration"] == 0) & (frame["linear_term"] == "ones") & (frame["start"] == "zero")]
    np.testing.assert_allclose(at_zero["gap"], (0.1 + 8) / 4)


def test_the_smoothness_is_the_largest_curvature():
    assert CURVATURE.max() == SMOOTHNESS


def test_projected_rac_lora_reaches_the_optimum_on_every_seed_at_the_theoretical_step(frame):
    assert last(frame, "RAC-LoRA, projected", 1.0).max() < 1e-12


def test_projected_steps_never_ascend(frame):
    rows = frame[frame["method"].isin(["RAC-LoRA, projected", "AsymmLoRA, projected"])]
    for _, run in rows.groupby(["method", "step", "linear_term", "start", "seed"]):
        assert (np.diff(run.sort_values("iteration")["gap"]) <= 1e-12).all()


def test_a_frozen_factor_and_a_single_adapter_do_not_arrive(frame):
    for method in ("LoRA", "AsymmLoRA, plain", "AsymmLoRA, projected"):
        assert (last(frame, method, 0.25) > ARRIVED).mean() > 0.9


def test_no_adapter_of_rank_one_gets_below_the_floor(frame):
    floor = rank_one_floor(SEEDS).set_index(["linear_term", "start", "seed"])["gap"]
    rows = frame[frame["method"].isin(["LoRA", "AsymmLoRA, plain", "AsymmLoRA, projected"])]
    least = rows.groupby(["linear_term", "start", "seed"])["gap"].min()
    assert (least >= floor.reindex(least.index) - 1e-9).all()


def test_at_the_theoretical_step_chains_without_the_projector_diverge(frame):
    for method in ("COLA", "RAC-LoRA, plain"):
        assert np.isinf(last(frame, method, 1.0)).mean() > 0.5


def test_with_a_frozen_factor_plain_and_projected_steps_end_at_the_same_point():
    """Both minimise f(W^0 + B A) over B, which is convex, so its minimum does not depend on how it is reached."""
    found = gaps(3, 4000)
    last_ones = found[found["iteration"] == 4000].set_index(["linear_term", "start", "seed"])
    projected = last_ones[(last_ones["method"] == "AsymmLoRA, projected") & (last_ones["step"] == 1.0)]["gap"]
    plain = last_ones[(last_ones["method"] == "AsymmLoRA, plain") & (last_ones["step"] == 0.25)]["gap"]
    is_done = np.isfinite(plain)
    np.testing.assert_allclose(projected[is_done], plain[is_done], rtol=1e-3)


def test_tables_and_figure_cover_all(frame):
    table = outcomes(frame)
    assert len(outcome_rows(table)) == len(METHODS) * len(STEPS)
    verdicts = [row[2] for row in claims(table, rank_one_floor(SEEDS))]
    assert verdicts[5] == "reproduced"
    assert verdicts[4] == "not reproduced" or NUM_STEPS < 4000
    assert len(gap_figure(curves(frame)).axes) == len(STEPS)
