import json

import numpy as np
import pytest
import torch

from experiments.benchmarks import round_time
from experiments.benchmarks.engines import Bench, Workload, largest_difference
from experiments.benchmarks.measure import Repetition, Timing, busy_seconds, time_in_turns
from experiments.benchmarks.round_memory import measure_memory

TINY = Workload(clients=3, steps=2, batch=4, rank=2)


def hand_trained(bench, client):
    """Two SGD steps on one client's factors with the gradients written out: an oracle that shares no code."""
    weights = {layer: bench.model.get_submodule(layer) for layer in bench.lora_a}
    factors = {layer: np.zeros((weights[layer].out_features, TINY.rank)) for layer in weights}
    rows, _ = round_time_batches(bench, client)
    for batch in rows:
        x, inputs, masks = bench.examples.inputs[batch].flatten(1).double().numpy(), {}, {}
        for layer, linear in weights.items():
            inputs[layer] = x
            frozen, bias = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
            x = x @ (frozen + factors[layer] @ bench.lora_a[layer].double().numpy()).T + bias
            masks[layer] = x > 0 if layer != "fc3" else np.ones_like(x)
            x = x * masks[layer]
        gradient = np.exp(x - x.max(1, keepdims=True))
        gradient /= gradient.sum(1, keepdims=True)
        gradient[np.arange(len(batch)), bench.examples.targets[batch].numpy()] -= 1
        gradient /= len(batch)
        steps = {}
        for layer in reversed(list(weights)):
            gradient = gradient * masks[layer]
            lora_a = bench.lora_a[layer].double().numpy()
            steps[layer] = gradient.T @ (inputs[layer] @ lora_a.T)
            gradient = gradient @ (weights[layer].weight.detach().double().numpy() + factors[layer] @ lora_a)
        for layer, step in steps.items():
            factors[layer] = factors[layer] - TINY.local.lr * step
    return {f"{layer}.lora_b": torch.from_numpy(factor).float() for layer, factor in factors.items()}


def round_time_batches(bench, client):
    from fedraclora.local import local_batches

    return local_batches(client.indices, client.seed, TINY.local)


@pytest.mark.parametrize("engine", ["cohort", "reused", "copied"])
def test_every_engine_takes_the_steps_of_gradients_written_out_by_hand(engine):
    bench = Bench(TINY)
    found = bench.engines()[engine]()
    expected = [hand_trained(bench, client) for client in bench.clients]
    assert largest_difference(found, expected) < 1e-5


def test_an_engine_can_be_called_again_and_does_the_same_work():
    for train in Bench(TINY).engines().values():
        first, second = train(), train()
        assert (first is None) == (second is None)
        if first is not None:
            assert largest_difference(second, first) < 1e-6


def test_the_floor_is_the_frozen_products_of_the_whole_cohort(monkeypatch):
    counted = []
    real = torch.mm

    def counting(left, right, **kwargs):
        counted.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        return real(left, right, **kwargs)

    floor = Bench(TINY).engines()["floor"]
    monkeypatch.setattr(torch, "mm", counting)
    floor()
    rows = TINY.clients * TINY.batch
    forward = 784 * 200 + 200 * 200 + 200 * 10
    input_gradients = 200 * 200 + 200 * 10
    assert sum(counted) == TINY.steps * 2 * rows * (forward + input_gradients)


def test_the_largest_difference_is_relative_to_each_factor():
    small, large = torch.full((2, 2), 1e-3), torch.full((2, 2), 1e3)
    found = [{"a": small * 1.1, "b": large}]
    assert largest_difference(found, [{"a": small, "b": large}]) == pytest.approx(0.1, rel=1e-5)


def test_engines_that_end_elsewhere_are_refused_with_their_name():
    engines = Bench(TINY).engines()
    engines["cohort"] = lambda: [{key: 1.001 * value for key, value in own.items()} for own in engines["reused"]()]
    with pytest.raises(RuntimeError, match=r"'cohort' differs from the loop by 1\.0e-03"):
        round_time.check_equal_work(engines)


def test_ratios_are_formed_within_a_repetition_before_the_median():
    turns = [Repetition({"slow": slow, "fast": fast}, 0.0) for slow, fast in ((2, 1), (30, 10), (8, 2))]
    assert Timing(tuple(turns)).ratio("slow", "fast") == 3
    assert Timing(tuple(turns)).seconds("slow") == 8


def test_only_repetitions_below_a_tenth_of_a_foreign_core_are_quiet():
    turns = tuple(Repetition({"a": 1.0}, load) for load in (0.0, 0.099, 0.1, 1.5))
    assert [item.foreign_cores for item in Timing(turns).quiet.repetitions] == [0.0, 0.099]


def test_engines_take_turns_and_the_clock_is_read_around_each():
    order, ticks = [], iter(range(100))
    engines = {name: lambda name=name: order.append(name) for name in "ab"}
    timing = time_in_turns(engines, 2, lambda: float(next(ticks)))
    assert order == list("ab" * 3)
    assert [dict(item.seconds) for item in timing.repetitions] == [{"a": 1.0, "b": 1.0}] * 2


def test_busy_seconds_leave_out_idle_and_waiting_time(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 999 888 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    ticks = 100 + 20 + 30 + 4 + 5 + 6
    assert busy_seconds(stat) == pytest.approx(ticks / 100)
    assert busy_seconds(tmp_path / "none") == 0.0


def test_the_command_prints_every_engine_and_writes_settings_versions_and_figures(tmp_path, capsys):
    threads, path = torch.get_num_threads(), tmp_path / "results.json"
    try:
        round_time.main(["--quick", "--repeats", "1", "--threads", "1", "--out", str(path)])
    finally:
        torch.set_num_threads(threads)
    results = json.loads(path.read_text())
    assert results["settings"]["threads"] == 1
    assert results["versions"]["torch"] == torch.__version__
    assert [item["workload"]["rank"] for item in results["ranks"]] == [1, 4, 16]
    for item in results["ranks"] + results["batch_sizes"]:
        assert item["difference"] < 1e-5
        assert len(item["foreign_cores"]) == 1
        assert item["engines"]["floor"]["percent_of_floor"] == pytest.approx(100)
        assert item["engines"]["reused"]["times_faster_than_loop"] == pytest.approx(1)
    assert "cohort engine" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not busy_seconds(), reason="reads /proc, which only Linux has")
def test_a_round_of_ten_thousand_clients_needs_less_than_400_mib_above_data_and_model():
    figures = measure_memory(10_000)
    assert figures["clients"] == 10_000
    assert 0 < figures["peak MiB above data and model"] < 400
