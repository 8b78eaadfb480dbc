"""The round loop: plans become Flower messages, replies become the next version, and every byte is written down.

This is the only file that speaks Flower for the server. The loop is ours where Flower's cannot resume, stop at a
budget, or leave the model alone in a round with too few usable replies; `start` has Flower's signature, so the
strategy works with any Grid.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedraclora.chain import Chain
from fedraclora.delivery import deliver, sketch_digest
from fedraclora.ledger import DOWN, UP, LedgerRow
from fedraclora.link import LowRank, shape_of
from fedraclora.plan import NO_STATE, RoundPlan
from fedraclora.seeding import derive_seed, stream
from strategies.method import ClientUpdate, Method, Updates
from strategies.replies import BadReply, Expected, Reply, expected_shapes, read_partition, read_reply
from strategies.rounds import NOBODY, QUERY_PARTITION, RoundReport, RoundSettings, ledger_rows, sample_cohort
from strategies.state import BudgetTooSmall, ServerState, exceeded
from strategies.wire import content_bytes

log = logging.getLogger("fedraclora")


class ChainStrategy(Strategy):
    """Runs any method of this project over a Flower Grid.

    The chain is the model; `state` is what the server remembers of its clients. Both are changed by each round, in
    place.
    """

    def __init__(
        self, method: Method, chain: Chain, settings: RoundSettings, *, state: ServerState | None = None
    ) -> None:
        self.method = method
        self.chain = chain
        self.settings = settings
        self.state = state or ServerState()
        self.stop_reason: str | None = None
        self.report = RoundReport(round=self.state.round, link=chain.num_links)
        self._nodes: dict[int, int] = {}
        self._sent: dict[int, int] = {}
        self._rows: list[LedgerRow] = []
        self._expected = Expected("", "", {}, torch.float32)

    # ---- the loop

    def rounds(self, grid: Grid, num_rounds: int, *, timeout: float | None = None) -> Iterator[RoundReport]:
        """Run the rounds after `state.round` up to `num_rounds` and yield each one's report.

        The first report of a fresh run is round 0, the handshake. Stops early where the budget would be exceeded (then
        `stop_reason` says so). Raises BudgetTooSmall where a fresh run cannot afford its first round.
        """
        setup = self.connect(grid, timeout)
        if self.state.round < 0:
            yield self._finish(RoundReport(round=0, link=self.chain.num_links, rows=setup))
        for round in range(self.state.round + 1, num_rounds + 1):
            began = time.perf_counter()
            messages = self.configure_train(round, ArrayRecord(), ConfigRecord(), grid)
            if self.stop_reason is not None:
                if self.state.traffic.total_bytes == 0:
                    raise BudgetTooSmall(f"no round affordable: {self.stop_reason}")
                return
            self.aggregate_train(round, grid.send_and_receive(messages, timeout=timeout))
            self.report = self._finish(self.report, time.perf_counter() - began)
            yield self.report

    def _finish(self, report: RoundReport, round_s: float = 0.0) -> RoundReport:
        self.state.round = report.round
        traffic = self.state.charge(report.rows)
        return replace(report, traffic=traffic, round_s=round_s)

    def connect(self, grid: Grid, timeout: float | None) -> list[LedgerRow]:
        """Learn which node owns which partition and return what asking cost.

        Raises RuntimeError where no client answers.
        """
        nodes = list(grid.get_node_ids())
        ask = [Message(RecordDict(), node, QUERY_PARTITION, group_id="0") for node in nodes]
        replies = list(grid.send_and_receive(ask, timeout=timeout))
        partitions: dict[int, int] = {}
        for reply in replies:
            partition = read_partition(reply)
            if partition in partitions.values():
                raise RuntimeError(f"two clients say that they own partition {partition}; each needs one of its own")
            if partition is not None:
                partitions[reply.metadata.src_node_id] = partition
        if not partitions:
            raise RuntimeError(f"no client said which partition it owns ({len(nodes)} nodes were asked)")
        self._nodes = {partition: node for node, partition in partitions.items()}
        sent = [(message, message.metadata.dst_node_id, DOWN) for message in ask]
        got = [(reply, reply.metadata.src_node_id, UP) for reply in replies]
        rows = [
            row
            for message, node, direction in sent + got
            for row in ledger_rows(message, 0, direction, partitions.get(node, NOBODY))
        ]
        return sorted(rows, key=lambda row: (row.partition, row.direction))

    # ---- one round, Flower's five phases

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return one message a client of the round's cohort: the plan, and what this client lacks of the model.

        `arrays` and `config` are not used: the chain is the model. Sets `stop_reason` where the budget forbids the
        round.
        """
        if self.chain.open is None:
            self.chain.open_link(self.method.open_link(self.chain.num_links))
        cohort = sample_cohort(self.settings.seed, server_round, self.settings)
        plan = self._plan(server_round)
        self._expected = self._expect(plan)
        contents: dict[tuple[int, int], tuple[RecordDict, dict[str, int]]] = {}
        messages, self._rows, self._sent = [], [], {}
        for partition in cohort:
            held = self.state.held.get(partition, 0)
            start = self.state.last_used.get(partition, NO_STATE) if plan.moments != "reset" else NO_STATE
            if (held, start) not in contents:
                shared = self._content(plan, held, start)
                contents[held, start] = shared, content_bytes(shared)
            if partition in self._nodes:
                content, size = contents[held, start]
                message = Message(content, self._nodes[partition], MessageType.TRAIN, group_id=str(server_round))
                messages.append(message)
                self._rows += ledger_rows(message, server_round, DOWN, partition, content=size)
                self._sent[partition] = self.chain.num_links
        down = dict.fromkeys(self._sent, 0)
        for row in self._rows:
            down[row.partition] += row.tensor_bytes
        self.stop_reason = exceeded(self.settings.budget, self.state, down, self._expected.num_bytes)
        self.report = RoundReport(round=server_round, link=self.chain.num_links, num_clients=len(cohort))
        return messages

    def _plan(self, round: int) -> RoundPlan:
        trained = self.method.trains(round)
        return RoundPlan(
            round=round,
            trained=trained.factors,
            dense=trained.dense,
            local=self.settings.local,
            moments=trained.moments,
            batch_seed=derive_seed(stream(self.settings.seed, "batches"), "round", round),
        )

    def _expect(self, plan: RoundPlan) -> Expected:
        assert self.chain.open is not None
        terms = self.chain.open.low_rank_terms()
        factors = {key: _factor_shape(terms, key) for key in plan.factors}
        dense = {name: tuple(self.chain.merged[name].shape) for name in plan.dense}
        trained = [terms[layer].target for layer in plan.trained] + list(plan.dense)
        return Expected(
            version=self.chain.digest,
            sketches=sketch_digest(self.chain.open),
            shapes=expected_shapes(factors, dense),
            dtype=self.chain.merged[trained[0]].dtype,
        )

    def _content(self, plan: RoundPlan, held: int, start_state: int) -> RecordDict:
        delivery = deliver(self.chain, held)
        record = ConfigRecord({**plan.to_record(), "start_state": start_state, "links": delivery.header})
        arrays = {kind: ArrayRecord({"flat": Array(flat)}) for kind, flat in delivery.arrays.items()}
        return RecordDict({"plan": record, **arrays})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, and with enough usable ones replace the open link by their aggregate.

        Returns no arrays (the chain is the model) and the round's counts; `report` holds the rest.
        """
        usable, failures, diverged = self._sort(server_round, replies)
        for partition in usable:
            self.state.held[partition] = self._sent[partition]
        is_updated = len(usable) >= self.settings.min_replies
        if is_updated:
            self._update(usable)
        else:
            log.warning(
                "round %d: %d usable replies, %d needed; the model is unchanged",
                server_round,
                len(usable),
                self.settings.min_replies,
            )
        examples = sum(reply.num_examples for reply in usable.values())
        loss = sum(reply.train_loss * reply.num_examples for reply in usable.values()) / max(examples, 1)
        self.report = replace(
            self.report,
            num_ok=len(usable),
            num_failed=len(failures),
            num_missing=self.report.num_clients - len(usable) - len(failures),
            is_updated=is_updated,
            has_diverged=not usable and bool(failures) and diverged == len(failures),
            train_loss=loss if usable else float("nan"),
            rows=self._rows,
            failures=failures,
        )
        return None, MetricRecord({"num-ok": len(usable), "num-failed": len(failures), "train-loss": loss})

    def _sort(self, round: int, replies: Iterable[Message]) -> tuple[dict[int, Reply], dict[int, str], int]:
        """Return the usable replies and the reasons of the others by partition, and how many of those diverged."""
        partitions = {node: partition for partition, node in self._nodes.items()}
        usable: dict[int, Reply] = {}
        failures: dict[int, str] = {}
        diverged = 0
        for message in sorted(replies, key=lambda reply: partitions.get(reply.metadata.src_node_id, NOBODY)):
            partition = partitions.get(message.metadata.src_node_id, NOBODY)
            self._rows += ledger_rows(message, round, UP, partition)
            if partition not in self._sent or partition in usable or partition in failures:
                # Paid for, but no client's one answer, so it counts neither as usable nor as failed.
                log.warning("round %d: a reply of client %d that nobody asked for is ignored", round, partition)
                continue
            try:
                usable[partition] = read_reply(message, self._expected)
            except BadReply as error:
                failures[partition] = str(error)
                diverged += error.is_divergence
                log.warning("round %d: the reply of client %d is not used: %s", round, partition, error)
        return usable, failures, diverged

    def _update(self, usable: dict[int, Reply]) -> None:
        assert self.chain.open is not None
        updates: Updates = {partition: self._weighted(reply) for partition, reply in usable.items()}
        terms = self.method.aggregate(self.chain.merged, self.chain.open, updates)
        self.chain.update(terms, close=self.method.closes(self.chain.updates_in_link + 1))
        self.state.last_used |= dict.fromkeys(usable, self.report.round)

    def _weighted(self, reply: Reply) -> ClientUpdate:
        weight = reply.update.weight if self.settings.weighting == "examples" else 1.0
        return ClientUpdate(reply.update.tensors, weight)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return no messages: the model is evaluated on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return None: no client was asked to evaluate."""
        return None

    def summary(self) -> None:
        """Log what is run."""
        log.info("%s: %s", type(self.method).__name__, self.settings)

    def start(  # noqa: PLR0913
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds as Flower's own `Strategy.start` would, and return the final weights.

        The initial model is the chain's, so `initial_arrays` must be left out or empty; `evaluate_fn` gets the merged
        weights.
        """
        if initial_arrays or train_config or evaluate_config:
            raise ValueError(
                "the chain holds the initial model and the settings; pass neither initial_arrays nor configs"
            )
        self.summary()
        result = Result()
        for report in self.rounds(grid, num_rounds, timeout=timeout):
            result.arrays = ArrayRecord(dict(self.chain.weights()))
            result.train_metrics_clientapp[report.round] = MetricRecord({"train-loss": report.train_loss})
            if evaluate_fn is not None and (metrics := evaluate_fn(report.round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[report.round] = metrics
        return result


def _factor_shape(terms: Mapping[str, LowRank], key: str) -> tuple[int, ...]:
    layer, _, name = key.rpartition(".")
    return shape_of(getattr(terms[layer], name))
