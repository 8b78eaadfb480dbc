"""The round loop: plans become Flower messages, replies become the next version, and every byte is written down.

This is the only file that speaks Flower for the server. The loop is ours where Flower's cannot resume, stop at a
budget, or leave the model alone in a round with too few usable replies; `start` has Flower's signature, so the
strategy works with any Grid.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedraclora.chain import Chain
from fedraclora.delivery import NOTHING, Needs
from fedraclora.ledger import DOWN, UP, LedgerRow, bytes_by_partition
from fedraclora.link import Link
from fedraclora.plan import NO_STATE, RoundPlan
from strategies.advancing import Advance
from strategies.asking import Asked, Contents, Own, plan_round, view_for
from strategies.exchange import exchange
from strategies.memory import VARIATES
from strategies.method import Method
from strategies.replies import BadReply, Reply, mean_lost, personal_accuracy, read_held, read_needs, read_reply
from strategies.roster import Roster
from strategies.rounds import NOBODY, QUERY_LINKS, RoundReport, RoundSettings, flip_coin, ledger_rows, sample_cohort
from strategies.state import BudgetTooSmall, ServerState, exceeded
from strategies.wire import content_bytes

log = logging.getLogger("fedraclora")

FOREIGN_LOOP = (
    "ChainStrategy runs its own rounds (`start`, `rounds`): what merges links cannot be driven by another loop, such "
    "as that of Flower's DifferentialPrivacy wrappers, whose noise would come too late. Set privacy.level, "
    "privacy.clip and privacy.noise instead"
)


class ChainStrategy(Strategy):
    """Runs any method of this project over a Flower Grid.

    The chain is the model; `state` is what the server remembers of its clients. Both are changed by each round, in
    place. `setup` is what a machine is told of the run (`fedraclora.setup.Setup` as text). Where availability is
    simulated, `reaches(round, partition)` says whether a client can be reached in a round; one that cannot is away
    without having gone: it is asked nothing, and is still known when it is back.
    """

    def __init__(  # noqa: PLR0913 - what a run begins with
        self,
        method: Method,
        chain: Chain,
        settings: RoundSettings,
        *,
        setup: str = "",
        state: ServerState | None = None,
        reaches: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.method = method
        self.chain = chain
        self.settings = settings
        self.setup = setup
        self.state = state or ServerState()
        self.stop_reason: str | None = None
        self.report = RoundReport(round=self.state.round, link=chain.num_links)
        self._roster = Roster(settings)
        self._asked: Asked | None = None
        self._reaches = reaches

    # ---- the loop

    def rounds(self, grid: Grid, num_rounds: int, *, timeout: float | None = None) -> Iterator[RoundReport]:
        """Run the rounds after `state.round` up to `num_rounds` and yield each one's report.

        The first report of a fresh run is round 0, the handshake. Stops early where the budget would be exceeded (then
        `stop_reason` says so). Raises BudgetTooSmall where a fresh run cannot afford its first round, and RuntimeError
        where no client is there.
        """
        setup = self.connect(grid)
        if self.state.round < 0:
            yield self._finish(RoundReport(round=0, link=self.chain.num_links, rows=setup))
        timeout_s = self.settings.timeout_s if timeout is None else timeout
        for round in range(self.state.round + 1, num_rounds + 1):
            began = time.perf_counter()
            met = self._roster.meet(grid, self._introduction(), self.state, round)
            messages = self.open_round(round, grid)
            if self.stop_reason is not None:
                if self.state.traffic.total_bytes == 0:
                    raise BudgetTooSmall(f"no round affordable: {self.stop_reason}")
                return
            self._now.rows += met
            replies = exchange(grid, messages, timeout_s=timeout_s, follow_up=self._follow_up)
            self.report = self._finish(self.close_round(round, replies), time.perf_counter() - began)
            yield self.report

    def connect(self, grid: Grid) -> list[LedgerRow]:
        """Learn which node owns which partition and how much of the chain it holds, and return what asking cost.

        Raises RuntimeError where no client answers in time, or two own one partition.
        """
        return self._roster.connect(grid, self._introduction(), self.state)

    @property
    def _now(self) -> Asked:
        """Return the round in progress. Raises RuntimeError where none has been configured."""
        if self._asked is None:
            raise RuntimeError("no round is open; open_round comes first")
        return self._asked

    def _introduction(self) -> RecordDict:
        return RecordDict({"setup": ConfigRecord({"chain": self.state.chain_id, "text": self.setup})})

    def _finish(self, report: RoundReport, round_s: float = 0.0) -> RoundReport:
        self.state.round = report.round
        traffic = self.state.charge(report.rows)
        return replace(report, traffic=traffic, round_s=round_s)

    # ---- one round

    def open_round(self, round: int, grid: Grid) -> list[Message]:
        """Return one message a client of the round's cohort: the plan, and what this client lacks of the model.

        With eager broadcast the other clients that lack closed links get those. Sets `stop_reason` where the budget
        forbids the round.
        """
        link = self._open_link()
        cohort = self._cohort(round)
        training = self.method.trains(round, link)
        self._asked = self._ask(plan_round(round, training, self.settings, self.state.clip), cohort)
        messages = self._train_messages(cohort) + self._broadcast(cohort)
        down = bytes_by_partition(self._now.rows)
        up = {partition: self._now.expected(partition).num_bytes for partition in sorted(self._now.sent)}
        self.stop_reason = exceeded(self.settings.budget, self.state, down, up)
        self.report = RoundReport(round=round, link=self.chain.num_links, num_clients=len(cohort))
        return messages

    def _open_link(self) -> Link:
        """Return the open link; where none is, the method opens one."""
        if self.chain.open is not None:
            return self.chain.open
        link = self.method.open_link(self.chain.num_links, self.chain.merged)
        self.chain.open_link(link)
        self.state.open_since = dict.fromkeys(link.explicit_factors, self.chain.version)
        return link

    def _cohort(self, round: int) -> list[int]:
        settings = self.settings
        # Privacy counts on nobody knowing who was asked, and the root seed travels with a deployed run's settings.
        is_secret = settings.is_deployed and settings.privacy is not None
        return sample_cohort(self.state.secret if is_secret else settings.seed, round, settings)

    def _ask(self, plan: RoundPlan, cohort: Sequence[int]) -> Asked:
        ranks = {partition: self.settings.ranks[partition] for partition in cohort if self.settings.ranks}
        views = {
            rank: view_for(self.chain, plan, rank=rank, alpha=self.settings.alpha) for rank in {0, *ranks.values()}
        }
        own = {partition: self._own(plan, partition) for partition in cohort}
        return Asked(plan, views, self.settings.max_norm, own, ranks)

    def _own(self, plan: RoundPlan, partition: int) -> Own:
        """Return what the plan says to one client alone."""
        settings = self.settings
        start = self.state.last_used.get(partition, NO_STATE) if plan.keeps_state else NO_STATE
        scale = settings.lr_scales[partition] if settings.lr_scales else 1.0
        coin = flip_coin(settings.seed, plan.round, settings.whole_probability)
        return Own(start, scale, is_whole=start == NO_STATE or coin)

    def _contents(self) -> Contents:
        state, plan = self.state, self._now.plan
        assert self.chain.open is not None
        variates = state.memory.recall(VARIATES, self.chain.open, mode=plan.sending.memory)
        return Contents(self.chain, state.open_since, state.chain_id, self.settings.catch_up, variates)

    def _train_messages(self, cohort: Sequence[int]) -> list[Message]:
        known: dict[tuple[Needs, Own, int], tuple[RecordDict, dict[str, int]]] = {}
        contents, messages = self._contents(), []
        for partition in cohort:
            if not self._is_there(partition):
                continue
            own, rank = self._now.own[partition], self._now.ranks.get(partition, 0)
            key = self._needs(partition), own, rank
            if key not in known:
                shared = contents.for_training(key[0], self._now.plan, own, self._now.view(partition))
                known[key] = shared, content_bytes(shared)
            messages.append(self._message(MessageType.TRAIN, partition, *known[key]))
            self._now.sent.add(partition)
        return messages

    def _broadcast(self, cohort: Sequence[int]) -> list[Message]:
        """Return the closed links for the clients outside the cohort that lack some, where broadcast is eager."""
        if self.settings.broadcast != "eager":
            return []
        known: dict[Needs, tuple[RecordDict, dict[str, int]]] = {}
        contents, messages = self._contents(), []
        for partition in sorted(self._roster.nodes.keys() - set(cohort)):
            needs = self._needs(partition)
            if needs.num_held < self.chain.num_links and self._is_there(partition):
                if needs not in known:
                    shared = contents.of_links(needs)
                    known[needs] = shared, content_bytes(shared)
                messages.append(self._message(QUERY_LINKS, partition, *known[needs]))
        return messages

    def _is_there(self, partition: int) -> bool:
        is_connected = partition in self._roster.nodes
        return is_connected and (self._reaches is None or self._reaches(self._now.plan.round, partition))

    def _needs(self, partition: int) -> Needs:
        state = self.state
        factors, opened = partition in state.draws_otherwise, state.held_open.get(partition, NOTHING)
        return Needs(state.held.get(partition, 0), factors=factors, open_version=opened)

    def _message(self, kind: str, partition: int, content: RecordDict, size: dict[str, int]) -> Message:
        """Return a message to a client and charge it."""
        round = self._now.plan.round
        node, ttl = self._roster.nodes[partition], self.settings.timeout_s
        # It lives no longer than its round: a client that wakes up later must not be kept busy by it.
        message = Message(content, node, kind, ttl=ttl, group_id=str(round))
        self._now.rows += ledger_rows(message, round, DOWN, partition, content=size)
        return message

    def _follow_up(self, asked: Message, reply: Message) -> Message | None:
        """Return the second message of a round to a client that needs something before it can train."""
        lacking = read_needs(reply)
        partition = self._roster.partition_of(reply)
        if lacking is None or partition not in self._now.sent or partition in self._now.retried:
            return None
        log.warning("round %d: client %d needs more: %s", self._now.plan.round, partition, lacking.reason)
        self._now.retried.add(partition)
        self._now.rows += ledger_rows(reply, self._now.plan.round, UP, partition)
        if lacking.needs.factors and partition not in self.state.draws_otherwise:
            self.state.draws_otherwise.append(partition)
        needs = replace(
            lacking.needs,
            num_held=min(lacking.needs.num_held, self.chain.num_links),
            factors=partition in self.state.draws_otherwise,
        )
        content = self._contents().for_training(
            needs, self._now.plan, self._now.own[partition], self._now.view(partition)
        )
        if lacking.setup:
            content["setup"] = self._introduction()["setup"]
        return self._message(asked.metadata.message_type, partition, content, content_bytes(content))

    def close_round(self, round: int, replies: Iterable[Message]) -> RoundReport:
        """Check the replies, replace the open link by the aggregate of enough usable ones, and return the report."""
        usable, failures, diverged = self._sort(round, replies)
        clip = self._now.plan.sending.clip or float("nan")
        needed = max(self.settings.min_replies, self.settings.robust.fewest)
        is_updated = len(usable) >= needed
        advance = Advance(self.method, self.chain, self.state, self.settings, self._now)
        gap = advance.update(usable) if is_updated else float("nan")
        advance.count_steps(usable)
        if not is_updated:
            log.warning(
                "round %d: %d usable replies, %d needed; the model is unchanged",
                round,
                len(usable),
                needed,
            )
        examples = sum(reply.num_examples for reply in usable.values())
        loss = sum(reply.train_loss * reply.num_examples for reply in usable.values()) / max(examples, 1)
        return replace(
            self.report,
            num_ok=len(usable),
            num_failed=len(failures),
            num_missing=self.report.num_clients - len(usable) - len(failures),
            num_retried=len(self._now.retried),
            is_updated=is_updated,
            has_diverged=not usable and bool(failures) and diverged == len(failures),
            train_loss=loss if usable else float("nan"),
            aggregation_gap=gap,
            personal_accuracy=personal_accuracy(usable.values()),
            lost=mean_lost(usable.values()),
            clip=clip,
            rows=self._now.rows,
            failures=failures,
        )

    def _sort(self, round: int, replies: Iterable[Message]) -> tuple[dict[int, Reply], dict[int, str], int]:
        """Return the usable replies and the reasons of the others by partition, and how many of those diverged."""
        usable: dict[int, Reply] = {}
        failures: dict[int, str] = {}
        diverged = 0
        for message in sorted(replies, key=self._roster.partition_of):
            partition = self._roster.partition_of(message)
            self._now.rows += ledger_rows(message, round, UP, partition)
            self._note_held(partition, message)
            if message.metadata.message_type == QUERY_LINKS:
                continue
            if partition not in self._now.sent or partition in usable or partition in failures:
                # Paid for, but no client's one answer, so it counts neither as usable nor as failed.
                log.warning("round %d: a reply of client %d that nobody asked for is ignored", round, partition)
                continue
            try:
                usable[partition] = read_reply(message, self._now.expected(partition))
            except BadReply as error:
                failures[partition] = str(error)
                diverged += error.is_divergence
                log.warning("round %d: the reply of client %d is not used: %s", round, partition, error)
        return usable, failures, diverged

    def _note_held(self, partition: int, message: Message) -> None:
        """Remember how many closed links a client says it keeps, whatever else becomes of its reply."""
        held, lacking = read_held(message), read_needs(message)
        if partition == NOBODY:
            return
        if lacking is not None:
            self.state.held[partition] = min(lacking.needs.num_held, self.chain.num_links)
            self.state.held_open[partition] = NOTHING
        elif held is not None:
            self.state.held[partition] = min(held.num_links, self.chain.num_links)
            if message.metadata.message_type != QUERY_LINKS:
                self.state.held_open[partition] = min(held.open_version, self.chain.version)

    # ---- Flower's phases, which only a foreign loop would call

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Raise RuntimeError: a wrapper's loop would merge links without its own noise."""
        raise RuntimeError(FOREIGN_LOOP)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Raise RuntimeError, as `configure_train`."""
        raise RuntimeError(FOREIGN_LOOP)

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
