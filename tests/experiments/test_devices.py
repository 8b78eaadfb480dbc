"""Simulated time is that of a simulation, event by event, that shares no code; who answers in time is decided by it."""

import heapq
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import count, product
from math import ceil

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from experiments.devices import PRESETS, Device, Timeline, device_table, load_devices, round_time, timeline_of
from experiments.problem import prepare
from experiments.run import run
from fedraclora.files import read_json
from tests.conformance.test_resume import Stop, assert_same_run
from tests.helpers import Silent, federation, nodes_grid, serialised_size, settings, without_figures

# ---- the oracle: a heap of events


class Events:
    """The events of one round, in the order of their time, each a method; in exact fractions of a second.

    `jobs` are a client's exchanges of the round, one after the other: bytes down, bytes up, steps.
    """

    def __init__(self, devices, jobs, deadline, silent):
        self.devices, self.silent, self.deadline = devices, silent, deadline
        self.jobs = {who: list(exchanges) for who, exchanges in jobs.items()}
        self.heap, self.number = [], count()
        self.came, self.waiting, self.is_over = set(), set(jobs), False

    def later(self, time, event, *arguments):
        heapq.heappush(self.heap, (Fraction(time), next(self.number), event, arguments))

    def run(self):
        now = Fraction(0)
        for who in self.jobs:
            self.later(0, self.message_leaves, who)
        if self.deadline:
            self.later(self.deadline, self.server_goes_on)
        while self.heap and not self.is_over:
            now, _, event, arguments = heapq.heappop(self.heap)
            event(now, *arguments)
        return now, self.came

    def server_goes_on(self, now):
        self.is_over = True

    def message_leaves(self, now, who):
        down, up, steps = self.jobs[who].pop(0)
        sent = now + down * 8 / (Fraction(self.devices[who].downlink_mbps) * 10**6)
        self.later(sent, self.on_its_way, who, self.message_arrives, up, steps)

    def on_its_way(self, now, who, arrives, *rest):
        self.later(now + Fraction(self.devices[who].latency_s), arrives, who, *rest)

    def message_arrives(self, now, who, up, steps):
        self.later(now + steps / Fraction(self.devices[who].steps_per_s), self.training_ends, who, up)

    def training_ends(self, now, who, up):
        sent = now + up * 8 / (Fraction(self.devices[who].uplink_mbps) * 10**6)
        self.later(sent, self.on_its_way, who, self.answer_is_due)

    def answer_is_due(self, now, who):
        if self.jobs[who]:
            self.later(now, self.message_leaves, who)
        elif who not in self.silent:
            self.came.add(who)
            self.stop_waiting(who)
        elif not self.deadline:
            self.stop_waiting(who)

    def stop_waiting(self, who):
        self.waiting.discard(who)
        self.is_over = not self.waiting


def simulate(devices, jobs, deadline=0.0, silent=()):
    """Return when a round is over and whose answers have come."""
    return Events(devices, jobs, deadline, silent).run()


rates = st.floats(0.01, 1e5)
devices = st.builds(
    Device, uplink_mbps=rates, downlink_mbps=rates, latency_s=st.floats(0, 5), steps_per_s=st.floats(0.01, 1e5)
)
exchanges = st.tuples(st.integers(0, 10**8), st.integers(0, 10**8), st.integers(0, 1000))
# As a share of the time that the round would take without one, so that some are kept and some are not.
deadlines = st.sampled_from([0.0, 0.2, 0.7, 0.95, 1.05, 3.0])


def deadline_of(share, devices, jobs):
    """Return a deadline; draws where rounding decides whether an answer is late are left out."""
    deadline = share * float(simulate(devices, jobs)[0]) or share
    for who, done in jobs.items():
        end, _ = simulate(devices, {who: done})
        assume(not deadline or abs(end - Fraction(deadline)) > Fraction(1, 10**9) * end)
    return deadline


@given(st.lists(st.tuples(devices, exchanges), max_size=6), deadlines)
@example([], 0.0)
@example([], 3.0)
def test_the_time_of_a_round_is_that_of_its_events(drawn, share):
    kinds = [device for device, _ in drawn]
    jobs = {who: [exchange] for who, (_, exchange) in enumerate(drawn)}
    deadline = deadline_of(share, kinds, jobs)
    down, up, steps = ({who: job[0][part] for who, job in jobs.items()} for part in range(3))
    end, _ = simulate(kinds, jobs, deadline)
    assert round_time(kinds, down, up, steps, deadline) == pytest.approx(float(end), rel=1e-12)


@given(
    st.lists(st.tuples(devices, st.lists(exchanges, min_size=1, max_size=2), st.booleans()), max_size=6),
    deadlines,
    st.randoms(use_true_random=False),
)
def test_who_is_heard_and_when_a_round_ends_is_what_its_events_say(drawn, share, shuffled):
    """Also where messages are lost, and where a client has to be sent a second one."""
    kinds = [replace(device, dropout=float(is_silent)) for device, _, is_silent in drawn]
    # Who does not answer gets no second message.
    jobs = {who: done[:1] if is_silent else done for who, (_, done, is_silent) in enumerate(drawn)}
    silent = [who for who, (_, _, is_silent) in enumerate(drawn) if is_silent]
    deadline = deadline_of(share, kinds, jobs)
    timeline = Timeline([*kinds, replace(PRESETS["lte"], dropout=1.0)], seed=0, deadline_s=deadline)
    # What was in the round before is over.
    timeline.receives(1, len(kinds), down_bytes=10**9, up_bytes=0, steps=0)
    timeline.receives(1, 0, down_bytes=10**9, up_bytes=0, steps=0)
    heard, order = set(), list(jobs)
    shuffled.shuffle(order)
    for who in order:
        for down, up, steps in jobs[who]:
            heard.discard(who)
            if not timeline.receives(2, who, down_bytes=down, up_bytes=up, steps=steps):
                break
            heard.add(who)
    end, came = simulate(kinds, jobs, deadline, silent)
    assert heard == came
    assert timeline.seconds(2) == pytest.approx(float(end), rel=1e-12)


def test_an_answer_at_the_deadline_is_in_time_and_what_is_not_named_costs_nothing():
    device = Device(uplink_mbps=8, downlink_mbps=4, latency_s=0.5, steps_per_s=2)
    assert round_time([device], {0: 10**6}, {}, {}) == 3.0
    assert round_time([device], {0: 10**6}, {0: 10**6}, {0: 4}, 6.0) == 6.0
    timeline = Timeline([device], seed=0, deadline_s=6.0)
    assert timeline.receives(1, 0, down_bytes=10**6, up_bytes=10**6, steps=4)
    assert not timeline.receives(2, 0, down_bytes=10**6, up_bytes=10**6 + 1, steps=4)


# ---- coins


def test_clients_are_away_and_silent_as_often_as_their_devices_say_and_independently():
    kinds = [replace(PRESETS["lte"], availability=0.8, dropout=0.3)] * 20
    timeline = Timeline(kinds, seed=5)
    cases = list(product(range(1, 401), range(20)))
    there = np.array([timeline.reaches(round, who) for round, who in cases])
    lost = np.array([not timeline.receives(round, who, down_bytes=0, up_bytes=0, steps=0) for round, who in cases])
    # Four standard deviations of the mean of 8000 coins.
    assert there.mean() == pytest.approx(0.8, abs=4 * 0.4 / 8000**0.5)
    assert lost.mean() == pytest.approx(0.3, abs=4 * 0.46 / 8000**0.5)
    assert abs(np.corrcoef(there, lost)[0, 1]) < 4 / 8000**0.5
    by_client, by_round = there.reshape(400, 20).mean(axis=0), there.reshape(400, 20).mean(axis=1)
    assert by_client.std() == pytest.approx(0.4 / 400**0.5, rel=0.5)
    assert by_round.std() == pytest.approx(0.4 / 20**0.5, rel=0.2)


def test_coins_depend_on_seed_round_and_client_alone():
    kinds = [replace(PRESETS["lte"], availability=0.5, dropout=0.5)] * 8

    def coins(seed, rounds):
        timeline = Timeline(kinds, seed=seed)
        return {
            (round, who): (
                timeline.reaches(round, who),
                timeline.receives(round, who, down_bytes=9, up_bytes=9, steps=1),
            )
            for round in rounds
            for who in range(8)
        }

    forwards, backwards = coins(1, range(1, 20)), coins(1, range(19, 0, -1))
    assert forwards == backwards
    assert coins(1, [7]).items() <= forwards.items()
    assert coins(2, range(1, 20)) != forwards


def test_in_the_handshake_everybody_answers_whatever_the_deadline():
    nobody = Device(uplink_mbps=1, downlink_mbps=1, latency_s=3, steps_per_s=1, availability=0, dropout=1)
    timeline = Timeline([nobody], seed=0, deadline_s=1.0)
    assert timeline.reaches(0, 0)
    assert timeline.receives(0, 0, down_bytes=0, up_bytes=0, steps=0)
    assert timeline.seconds(0) == 6.0
    assert not timeline.reaches(1, 0)
    assert timeline.seconds(1) == 1.0


# ---- runs

KINDS = [
    Device(uplink_mbps=1.0, downlink_mbps=5.0, latency_s=0.1, steps_per_s=10),
    Device(uplink_mbps=0.2, downlink_mbps=2.0, latency_s=0.0, steps_per_s=40),
    Device(uplink_mbps=8.0, downlink_mbps=0.5, latency_s=0.02, steps_per_s=5),
    Device(uplink_mbps=90.0, downlink_mbps=90.0, latency_s=1.0, steps_per_s=300),
    Device(uplink_mbps=0.1, downlink_mbps=30.0, latency_s=0.3, steps_per_s=70),
    Device(uplink_mbps=2.0, downlink_mbps=2.0, latency_s=0.05, steps_per_s=2),
]
TIME_COLUMNS = ["round_s", "simulated_s", "cum_simulated_s"]


@pytest.fixture
def write(tmp_path):
    def write(kinds, name="devices.csv"):
        device_table(kinds).to_csv(tmp_path / name, index=False)
        return str(tmp_path / name)

    return write


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    without_figures(monkeypatch)


def ran(folder, **changes):
    run(settings(out=str(folder), **changes), Silent())
    return pd.read_csv(folder / "rounds.csv"), pd.read_csv(folder / "ledger.csv")


def jobs_of(ledger, round, steps):
    """Return a round's exchanges by client from the record bytes of the ledger; each has one."""
    rows = ledger[ledger["round"] == round]
    sizes = rows.groupby(["partition", "direction"])["record_bytes"].sum().unstack(fill_value=0)
    return {who: [(int(size["down"]), int(size.get("up", 0)), steps(who))] for who, size in sizes.iterrows()}


@pytest.mark.parametrize(
    "more", [{}, {"method": "fed_it", "broadcast": "eager"}, {"method": "full", "local_epochs": 1}]
)
def test_the_time_of_a_run_is_that_of_the_messages_in_its_ledger(tmp_path, write, more):
    """The handshake's, too, and that of links sent to clients which do not train."""
    chosen = {"rounds": 5, "devices": write(KINDS), **more}
    rounds, ledger = ran(tmp_path / "run", **chosen)
    sizes = [len(rows) for rows in prepare(settings(**chosen)).split.indices]
    trained = set(
        zip(*ledger[ledger["kind"].isin(["update", "dense"])][["round", "partition"]].to_numpy().T, strict=True)
    )
    for round, seconds in zip(rounds["round"], rounds["simulated_s"], strict=True):

        def steps(who, round=round):
            epoch = ceil(sizes[who] / 8) if "local_epochs" in more else 3
            return epoch if (round, who) in trained else 0

        end, _ = simulate(KINDS, jobs_of(ledger, round, steps))
        assert seconds == pytest.approx(float(end), rel=1e-12)
    np.testing.assert_allclose(rounds["cum_simulated_s"], rounds["simulated_s"].cumsum(), rtol=1e-12)
    assert rounds["simulated_s"].min() > 0


@pytest.mark.parametrize(
    "more",
    [{}, {"method": ("rac_lora", {"moments": "carry"}), "momentum": 0.9}, {"method": "fed_it", "broadcast": "eager"}],
)
def test_devices_that_always_answer_change_nothing_but_the_time(tmp_path, write, more):
    plain, plain_ledger = ran(tmp_path / "plain", **more)
    timed, timed_ledger = ran(tmp_path / "timed", devices=write(KINDS), **more)
    assert read_json(tmp_path / "plain" / "chain" / "index.json") == read_json(
        tmp_path / "timed" / "chain" / "index.json"
    )
    pd.testing.assert_frame_equal(plain.drop(columns=TIME_COLUMNS), timed.drop(columns=TIME_COLUMNS))
    pd.testing.assert_frame_equal(plain_ledger, timed_ledger)
    assert plain[["simulated_s", "cum_simulated_s"]].isna().all().all()
    assert not (tmp_path / "plain" / "devices.csv").exists()


def test_the_summary_says_how_long_the_run_and_each_target_took(tmp_path, write):
    targets = [0.05, 0.999]
    rounds, _ = ran(tmp_path / "run", devices=write(KINDS), target_accuracies=targets)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["simulated_s"] == pytest.approx(rounds["simulated_s"].sum())
    first = rounds[rounds["test_accuracy"] >= 0.05].iloc[0]
    assert summary["targets"]["0.05"]["simulated_s"] == pytest.approx(first["cum_simulated_s"])
    assert summary["targets"]["0.999"] is None
    ran(tmp_path / "plain", target_accuracies=targets)
    plain = read_json(tmp_path / "plain" / "summary.json")
    assert plain["simulated_s"] is None
    assert "simulated_s" not in plain["targets"]["0.05"]


def heard_in(ledger, round):
    return set(ledger[(ledger["round"] == round) & (ledger["direction"] == "up")]["partition"])


def asked_in(ledger, round):
    return set(ledger[(ledger["round"] == round) & (ledger["direction"] == "down")]["partition"])


CARRY = {"method": ("rac_lora", {"moments": "carry"}), "momentum": 0.9}


@pytest.mark.parametrize("more", [{}, CARRY])
@pytest.mark.parametrize("deadline", [0.7, 0.9, 1.6, 30.0])
def test_a_deadline_drops_exactly_those_who_are_late(tmp_path, write, deadline, more):
    """The rest is the run that loses the same replies: late clients trained, and start from what was last used."""
    chosen = {"rounds": 4, "fraction": 1.0, **more}
    rounds, ledger = ran(tmp_path / "run", devices=write(KINDS), deadline_s=deadline, **chosen)
    whole = pd.read_csv(ran_whole(tmp_path, write, chosen) / "ledger.csv")
    answer = {round: max(up for [(_, up, _)] in jobs_of(whole, round, lambda who: 3).values()) for round in range(1, 5)}
    late = {}
    for round in range(1, 5):
        jobs = {
            who: [(down, answer[round], steps)]
            for who, [(down, _, steps)] in jobs_of(ledger, round, lambda who: 3).items()
        }
        end, came = simulate(KINDS, jobs, deadline)
        assert asked_in(ledger, round) == set(range(6)), "the message to a late client is charged"
        assert heard_in(ledger, round) == came
        late[round] = set(range(6)) - came
        # Replies differ by a few bytes in how they state their numbers.
        assert rounds["simulated_s"][round] == pytest.approx(float(end), rel=1e-2)
        assert (rounds["num_ok"][round], rounds["num_missing"][round]) == (len(came), 6 - len(came))
        assert rounds["simulated_s"][round] == deadline or not late[round]
    assert bool(any(late.values())) == (deadline < 30)
    lost = lambda who, reply: None if who in late[int(reply.metadata.group_id)] else reply  # noqa: E731
    parts = federation(settings(**chosen), fault=lost)
    parts.run()
    assert parts.chain.digest == read_json(tmp_path / "run" / "summary.json")["chain_digest"]


def ran_whole(tmp_path, write, chosen):
    ran(tmp_path / "whole", devices=write(KINDS), **chosen)
    return tmp_path / "whole"


FICKLE = [replace(device, availability=0.6, dropout=0.3) for device in KINDS]


@pytest.mark.parametrize("broadcast", ["lazy", "eager"])
def test_who_is_away_costs_nothing_and_who_drops_out_costs_its_message(tmp_path, write, broadcast):
    chosen = {"rounds": 12, "fraction": 0.67, "broadcast": broadcast, "devices": write(FICKLE)}
    rounds, ledger = ran(tmp_path / "run", **chosen)
    cohorts = ran(tmp_path / "plain", **(chosen | {"devices": "none", "broadcast": "lazy"}))[1]
    timeline = timeline_of(settings(**chosen))
    seen = {"away": 0, "silent": 0, "heard": 0}
    for round in range(1, 13):
        cohort = asked_in(cohorts, round)
        there = {who for who in range(6) if timeline.reaches(round, who)}
        heard = {who for who in range(6) if timeline.receives(round, who, down_bytes=0, up_bytes=0, steps=0)}
        asked = asked_in(ledger, round)
        assert asked <= there
        assert asked & cohort == cohort & there
        assert heard_in(ledger, round) == asked & heard
        assert broadcast == "eager" or asked <= cohort
        row = rounds.loc[round]
        assert (row["num_clients"], row["num_ok"]) == (len(cohort), len(cohort & there & heard))
        assert row["num_failed"] == row["num_retried"] == 0
        assert row["num_missing"] == len(cohort) - row["num_ok"]
        seen["away"] += len(cohort - there)
        seen["silent"] += len(cohort & there - heard)
        seen["heard"] += len(cohort & there & heard)
    assert min(seen.values()) > 3
    assert set(ledger[ledger["kind"] == "setup"]["round"]) == {0}, "who comes back is not introduced again"


def test_who_is_away_or_drops_out_is_a_client_whose_reply_is_lost(tmp_path, write):
    """Whatever the clients carry from round to round."""
    chosen = {**CARRY, "rounds": 8, "fraction": 1.0}
    rounds, _ = ran(tmp_path / "run", devices=write(FICKLE), **chosen)
    timeline = Timeline(FICKLE, seed=0)

    def lost(who, reply):
        round = int(reply.metadata.group_id)
        is_heard = timeline.receives(round, who, down_bytes=0, up_bytes=0, steps=0)
        return reply if timeline.reaches(round, who) and is_heard else None

    parts = federation(settings(**chosen), fault=lost)
    reports = parts.run()
    assert [report.num_ok for report in reports] == list(rounds["num_ok"])
    assert 0 < rounds["num_ok"].sum() < 48
    assert parts.chain.digest == read_json(tmp_path / "run" / "summary.json")["chain_digest"]


@pytest.mark.parametrize("deadline", [0.0, 2.5])
def test_rounds_without_anybody_pass_and_change_nothing(tmp_path, write, deadline):
    nobody = [replace(device, availability=0.0) for device in KINDS]
    rounds, ledger = ran(tmp_path / "run", devices=write(nobody), deadline_s=deadline, connect_s=60.0)
    assert list(rounds["simulated_s"][1:]) == [deadline] * 3
    assert list(rounds["num_missing"][1:]) == [3] * 3
    assert set(ledger["round"]) == {0}
    assert rounds["test_accuracy"].nunique() == 1


def test_without_a_deadline_a_lost_answer_costs_the_time_until_it_was_due(tmp_path, write):
    """With one, the server waits for it, though all who answer have answered."""
    silent = [*KINDS[:5], replace(KINDS[5], dropout=1.0)]
    plain, _ = ran(tmp_path / "plain", fraction=1.0, rounds=1, devices=write(KINDS))
    lost, _ = ran(tmp_path / "lost", fraction=1.0, rounds=1, devices=write(silent))
    waited, _ = ran(tmp_path / "waited", fraction=1.0, rounds=1, devices=write(silent), deadline_s=99.0)
    assert plain["num_ok"][1] == 6
    assert lost["num_ok"][1] == waited["num_ok"][1] == 5
    assert lost["simulated_s"][1] == plain["simulated_s"][1]
    assert waited["simulated_s"][1] == 99.0


def test_a_client_that_needs_a_second_message_takes_the_time_of_both(tmp_path):
    chosen = settings(fraction=1.0, num_clients=4, rounds=2, exact=True)
    parts = federation(chosen, grid=nodes_grid(tmp_path, lose_the_disk_of(2)))
    timeline = parts.grid._timeline = Timeline(KINDS[:4], seed=0)
    assert [report.num_retried for report in parts.run()] == [0, 0, 1]
    jobs = {}
    for way, who, message in parts.grid.seen:
        if message.metadata.group_id != "2":
            continue
        if way == "down":
            jobs.setdefault(who, []).append([serialised_size(message)])
        else:
            is_trained = "update" in message.content.array_records
            jobs[who][-1] += [serialised_size(message), 3 if is_trained else 0]
    assert [len(jobs[who]) for who in range(4)] == [1, 1, 2, 1]
    end, _ = simulate(KINDS, jobs)
    assert timeline.seconds(2) == pytest.approx(float(end), rel=1e-12)


def lose_the_disk_of(which):
    hit = []

    def trouble(partition, message, disk):
        if partition == which and message.metadata.group_id == "2" and not hit:
            hit.append(True)
            for path in disk.glob("*/*"):
                path.unlink()

    return trouble


# ---- resuming


def test_a_run_that_is_resumed_goes_on_with_the_same_coins_and_the_same_clock(tmp_path, write):
    chosen = {**CARRY, "rounds": 6, "fraction": 1.0, "devices": write(FICKLE), "deadline_s": 1.8}
    ran(tmp_path / "whole", **chosen)
    for after in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(settings(out=str(tmp_path / "parts"), resume=after > 0, **chosen), Stop(after))
    ran(tmp_path / "parts", resume=True, **chosen)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    rounds = pd.read_csv(tmp_path / "whole" / "rounds.csv")
    assert 0 < rounds["num_missing"].sum() < 36
    assert rounds["num_ok"].sum() > 0


def test_a_run_does_not_go_on_with_other_devices(tmp_path, write):
    chosen = {"rounds": 2, "devices": write(KINDS)}
    ran(tmp_path / "run", **chosen)
    write([*KINDS[:5], PRESETS["lte"]])
    with pytest.raises(ValueError, match="no longer those of"):
        run(settings(out=str(tmp_path / "run"), **(chosen | {"rounds": 3, "resume": True})), Silent())


def test_the_devices_in_a_run_s_folder_are_those_it_had(tmp_path):
    ran(tmp_path / "run", devices="mixed", seed=3)
    dealt = load_devices("mixed", 6, 3)
    assert load_devices(str(tmp_path / "run" / "devices.csv"), 6, 0) == dealt


# ---- where devices come from


def test_presets_are_the_same_for_all_and_mixed_deals_thirds_by_seed():
    assert load_devices("none", 5, 0) == []
    for name, device in PRESETS.items():
        assert load_devices(name, 3, 0) == [device] * 3
        assert (device.availability, device.dropout) == (1.0, 0.0)
    dealt = load_devices("mixed", 31, 0)
    assert sorted(dealt.count(device) for device in PRESETS.values()) == [10, 10, 11]
    assert load_devices("mixed", 31, 0) == dealt != load_devices("mixed", 31, 1)
    assert timeline_of(settings()) is None


HEADER = "uplink_mbps,downlink_mbps,latency_s,steps_per_s"


def test_rows_without_client_are_repeated_in_order(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text(f"{HEADER}\n1,2,0.1,3\n4,5,0.2,6\n")
    first, second = Device(1, 2, 0.1, 3), Device(4, 5, 0.2, 6)
    assert load_devices(str(path), 4, 0) == [first, second, first, second]
    assert load_devices(str(path), 1, 0) == [first]


def test_rows_with_client_may_come_in_any_order_and_be_more_than_there_are_clients(tmp_path):
    path = tmp_path / "any.csv"
    table = device_table(FICKLE).iloc[::-1]
    table.to_csv(path, index=False)
    assert load_devices(str(path), 4, 0) == FICKLE[:4]
    assert [asdict(device) for device in load_devices(str(path), 6, 0)] == [asdict(device) for device in FICKLE]


REFUSED = {
    "columns ['latency_s', 'steps_per_s'] are missing": "uplink_mbps,downlink_mbps\n1,2\n",
    "column 'dropuot' is unknown; did you mean 'dropout'?": f"{HEADER},dropuot\n1,2,0,3,0\n",
    "line 3: uplink_mbps=0.0 must be positive": f"{HEADER}\n1,2,0,3\n0,2,0,3\n",
    "line 2: downlink_mbps=-2.0 must be positive": f"{HEADER}\n1,-2,0,3\n",
    "line 2: steps_per_s=inf must be positive and finite": f"{HEADER}\n1,2,0,inf\n",
    "line 2: latency_s=-0.1 must be finite, and at least 0": f"{HEADER}\n1,2,-0.1,3\n",
    "line 2: latency_s=inf must be finite": f"{HEADER}\n1,2,inf,3\n",
    "line 2: availability=1.5 is a probability": f"{HEADER},availability\n1,2,0,3,1.5\n",
    "line 2: dropout=-0.1 is a probability": f"{HEADER},dropout\n1,2,0,3,-0.1\n",
    "client 2 has no row; column 'client' must name each of 0 to 2": f"client,{HEADER}\n0,1,2,0,3\n1,1,2,0,3\n",
    "names a client twice": f"client,{HEADER}\n0,1,2,0,3\n1,1,2,0,3\n1,1,2,0,3\n",
    "column 'steps_per_s' must hold a number in every row": f"{HEADER}\n1,2,0,fast\n",
    "column 'latency_s' must hold a number in every row": f"{HEADER}\n1,2,,3\n",
    "it holds no row": f"{HEADER}\n",
    "No columns to parse": "",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason_before_anything_is_written(tmp_path, words):
    path = tmp_path / "bad.csv"
    path.write_text(REFUSED[words])
    for attempt in (
        lambda: load_devices(str(path), 3, 0),
        lambda: run(settings(num_clients=3, devices=str(path), out=str(tmp_path / "run")), Silent()),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below, not matched
            attempt()
        assert words in str(caught.value)
        assert str(path) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_neither_preset_nor_file_is_refused():
    with pytest.raises(ValueError, match="did you mean 'lte'"):
        load_devices("ltte", 3, 0)
    with pytest.raises(ValueError, match=r"nowhere\.csv: it cannot be read: No such file"):
        load_devices("nowhere.csv", 3, 0)
