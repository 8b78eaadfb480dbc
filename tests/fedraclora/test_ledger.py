"""Tests of fedraclora.ledger: its sums are those of a table of its rows."""

from dataclasses import asdict

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.ledger import CATCH_UP_KINDS, DOWN, KINDS, UP, LedgerRow, Traffic, bytes_by_partition, summarize

counts = st.integers(0, 10**9)
rows = st.lists(
    st.builds(
        LedgerRow,
        round=st.integers(0, 5),
        direction=st.sampled_from([UP, DOWN]),
        partition=st.integers(0, 4),
        kind=st.sampled_from(KINDS),
        parameters=counts,
        tensor_bytes=counts,
        record_bytes=counts,
    ),
    max_size=30,
)


def _table(rows: list[LedgerRow]) -> pd.DataFrame:
    return pd.DataFrame([asdict(row) for row in rows], columns=list(LedgerRow.__dataclass_fields__))


@given(rows=rows)
def test_traffic_is_the_sums_by_direction(rows: list[LedgerRow]) -> None:
    table, traffic = _table(rows), summarize(iter(rows))
    sums = table.groupby("direction")[["tensor_bytes", "record_bytes"]].sum().reindex([UP, DOWN], fill_value=0)
    assert traffic.uplink_bytes == sums.loc[UP, "tensor_bytes"]
    assert traffic.downlink_bytes == sums.loc[DOWN, "tensor_bytes"]
    assert traffic.uplink_record_bytes == sums.loc[UP, "record_bytes"]
    assert traffic.downlink_record_bytes == sums.loc[DOWN, "record_bytes"]
    assert traffic.total_bytes == table["tensor_bytes"].sum()


@given(rows=rows)
def test_catching_up_is_a_part_of_the_downlink(rows: list[LedgerRow]) -> None:
    table, traffic = _table(rows), summarize(rows)
    caught_up = table[(table["direction"] == DOWN) & table["kind"].isin(["catch_up", "snapshot"])]
    assert traffic.catchup_bytes == caught_up["tensor_bytes"].sum()
    assert traffic.catchup_bytes <= traffic.downlink_bytes


@given(rows=rows)
def test_bytes_by_partition_are_both_directions_of_each_client(rows: list[LedgerRow]) -> None:
    assert bytes_by_partition(iter(rows)) == _table(rows).groupby("partition")["tensor_bytes"].sum().to_dict()


@given(first=rows, second=rows)
def test_traffic_adds_as_its_rows_do(first: list[LedgerRow], second: list[LedgerRow]) -> None:
    assert summarize(first) + summarize(second) == summarize(first + second)


def test_no_rows_are_no_traffic() -> None:
    assert summarize([]) == Traffic()
    assert Traffic().total_bytes == 0
    assert set(CATCH_UP_KINDS) < set(KINDS)
