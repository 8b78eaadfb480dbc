"""Who is there: which node owns which partition, learnt by asking.

Node ids say nothing: a simulation draws them anew for each run, and a node that is restarted without keys comes back
under another one. Only partitions are sampled, paid for and remembered.
"""

import logging
import time
from collections.abc import Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedraclora.delivery import NOTHING
from fedraclora.ledger import DOWN, UP, LedgerRow
from strategies.exchange import exchange
from strategies.replies import BadReply, Introduction, read_introduction
from strategies.rounds import NOBODY, QUERY_PARTITION, RoundSettings, ledger_rows
from strategies.state import ServerState

log = logging.getLogger("fedraclora")

POLL_S = 0.5


class Roster:
    """The nodes that are connected, by the partition that each owns."""

    def __init__(self, settings: RoundSettings) -> None:
        self.settings = settings
        self.nodes: dict[int, int] = {}
        self._owners: dict[int, int] = {}
        self._asked: set[int] = set()
        self._refusals: list[str] = []

    def partition_of(self, reply: Message) -> int:
        """Return the partition of the node that a message comes from, NOBODY for an unknown one."""
        return self._owners.get(reply.metadata.src_node_id, NOBODY)

    def connect(self, grid: Grid, introduction: RecordDict, state: ServerState) -> list[LedgerRow]:
        """Wait for the clients, ask each which partition it owns, and return what asking cost.

        Raises RuntimeError where no client answers in time, or two own one partition.
        """
        end = time.monotonic() + self.settings.connect_s
        rows = self._ask(grid, introduction, state, round=0, is_start=True)
        if len(self.nodes) < self.settings.num_clients:
            log.info("waiting for %d clients, %d are there", self.settings.num_clients, len(self.nodes))
        while len(self.nodes) < self.settings.num_clients and time.monotonic() < end:
            time.sleep(POLL_S)
            rows += self._ask(grid, introduction, state, round=0, is_start=True)
        self._check_anyone()
        if len(self.nodes) < self.settings.num_clients:
            log.warning(
                "%d of %d clients are there; the others count as missing", len(self.nodes), self.settings.num_clients
            )
        return sorted(rows, key=lambda row: (row.partition, row.direction))

    def meet(self, grid: Grid, introduction: RecordDict, state: ServerState, round: int) -> list[LedgerRow]:
        """Notice who has gone and who has come since the last round, and return what asking the newcomers cost.

        With nobody left it waits; raises RuntimeError where nobody comes in time.
        """
        end = time.monotonic() + self.settings.connect_s
        rows: list[LedgerRow] = []
        while True:
            rows += self._ask(grid, introduction, state, round=round, is_start=False)
            if self.nodes or time.monotonic() > end:
                break
            time.sleep(POLL_S)
        self._check_anyone()
        return rows

    def _check_anyone(self) -> None:
        if not self.nodes:
            reason = f"; the last one says: {self._refusals[-1]}" if self._refusals else ""
            raise RuntimeError(
                f"no client said which partition it owns ({len(self._asked)} nodes were asked within "
                f"connect_s={self.settings.connect_s:g} seconds){reason}"
            )

    def _ask(
        self, grid: Grid, introduction: RecordDict, state: ServerState, *, round: int, is_start: bool
    ) -> list[LedgerRow]:
        """Ask the nodes that have not been asked yet, and drop those that are gone."""
        present = list(grid.get_node_ids())
        here = set(present)
        self.nodes = {partition: node for partition, node in self.nodes.items() if node in here}
        # Asked once, and again only where it has been away: a silent node must not hold up every round.
        new = [node for node in present if node not in self._asked]
        self._asked = here
        messages = [Message(introduction, node, QUERY_PARTITION, group_id=str(round)) for node in new]
        timeout_s = min(self.settings.connect_s, self.settings.timeout_s)
        replies = exchange(grid, messages, timeout_s=timeout_s)
        self._read(replies, state, is_start=is_start)
        sent = [(message, message.metadata.dst_node_id, DOWN) for message in messages]
        got = [(reply, reply.metadata.src_node_id, UP) for reply in replies]
        return [
            row
            for message, node, direction in sent + got
            for row in ledger_rows(message, round, direction, self._owners.get(node, NOBODY))
        ]

    def _read(self, replies: Sequence[Message], state: ServerState, *, is_start: bool) -> None:
        """Take the newcomers in."""
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                stated = read_introduction(reply)
            except BadReply as error:
                self._refusals.append(str(error))
                log.warning("a client cannot take part: %s", error)
                continue
            if stated.partition in self.nodes and is_start:
                raise RuntimeError(
                    f"two clients say that they own partition {stated.partition}; each needs one of its own"
                )
            self._owners[node] = stated.partition
            # The newest wins: a node that was restarted may be listed twice for a while.
            self.nodes[stated.partition] = node
            _note_held(state, stated)


def _note_held(state: ServerState, stated: Introduction) -> None:
    """Believe a client that holds less than is remembered; a machine of many may hold more than each was sent."""
    remembered = state.held.get(stated.partition, 0)
    if stated.num_held < remembered:
        state.held[stated.partition] = max(0, stated.num_held)
    if stated.open_version < state.held_open.get(stated.partition, NOTHING):
        state.held_open[stated.partition] = NOTHING
