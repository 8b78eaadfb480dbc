"""Compression in whole runs: what a compressor saves at the same accuracy, and what travels each way."""

import pytest
import torch

from experiments.runtimes.in_process import InProcessGrid
from fedraclora.tasks import evaluate
from tests.helpers import federation, settings

TARGET = 0.85


def bytes_to_target(**changes):
    """Return the uplink tensor bytes up to the round that first reaches the target on held-out MNIST images."""
    chosen = settings(
        dataset="mnist_5k", model=("mlp", {"hidden": [64]}), partition="iid", num_clients=20, rounds=40, rank=8, lr=2.0,
        local_steps=10, batch_size=32, **changes,
    )  # fmt: skip
    parts = federation(chosen, grid=InProcessGrid)
    model, dataset = parts.problem.model, parts.problem.dataset
    total = 0
    for report in parts.iterate():
        total += report.traffic.uplink_bytes
        model.load_state_dict(parts.chain.weights())
        if evaluate(model, dataset.test, dataset.task)[1] >= TARGET:
            return total
    pytest.fail(f"{changes} did not reach {TARGET} in {chosen.rounds} rounds")


@pytest.mark.parametrize("scale_per", ["tensor", "column"])
def test_int8_takes_at_most_three_tenths_of_float32s_uplink_to_the_same_accuracy(scale_per):
    assert bytes_to_target(uplink=("int8", {"scale_per": scale_per})) <= 0.3 * bytes_to_target()


def test_a_compressed_downlink_leaves_server_and_clients_with_the_same_bits():
    parts = federation(settings(downlink="int8", rounds=4))
    reports = parts.run()
    for name, tensor in parts.replica.chain.merged.items():
        # The replica has what was closed before the last round's update.
        assert tensor.shape == parts.chain.merged[name].shape
    assert all(report.num_ok == report.num_clients for report in reports[1:]), "their digests are equal"
    plain = federation(settings(rounds=4)).run()
    down = [report.traffic.downlink_bytes for report in reports]
    whole = [report.traffic.downlink_bytes for report in plain]
    assert 0.25 <= sum(down) / sum(whole) < 0.4


def test_both_ways_at_once_and_a_late_client_catches_up_to_the_same_model():
    parts = federation(settings(uplink="int4", downlink="float16", fraction=1 / 6, rounds=12))
    assert all(report.num_ok == 1 for report in parts.run()[1:])


def test_a_lossless_uplink_changes_nothing_but_bytes():
    plain, packed = federation(settings(rounds=3)), federation(settings(uplink="lossless", rounds=3))
    plain_bytes = sum(report.traffic.uplink_bytes for report in plain.run())
    packed_bytes = sum(report.traffic.uplink_bytes for report in packed.run())
    assert packed_bytes <= plain_bytes
    for name, tensor in plain.chain.weights().items():
        torch.testing.assert_close(packed.chain.weights()[name], tensor, rtol=1e-5, atol=1e-6)
