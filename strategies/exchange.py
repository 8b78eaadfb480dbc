"""Messages out, replies in, until all have answered or the round is over.

Flower's `send_and_receive` cannot be used for a round: a client that needs one more message before it can train has to
get it while the others are still at work, within the same deadline.
"""

import time
from collections.abc import Callable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

# Replies are looked for often at first, as a simulation needs it, and ever less often while none comes.
FIRST_POLL_S, LAST_POLL_S = 0.02, 1.0
# How often it is asked which nodes are still there.
PRESENCE_S = 5.0


FollowUp = Callable[[Message, Message], Message | None]

# Codes of the errors that Flower makes itself where no reply of a client will come.
NO_REPLY_CODES = (3, 4, 5)


def exchange(
    grid: Grid, messages: Sequence[Message], *, timeout_s: float, follow_up: FollowUp | None = None
) -> list[Message]:
    """Send the messages and return the replies that came within `timeout_s` seconds, in the order of the messages.

    `follow_up` sees each message with its reply as it comes; a message that it returns is sent at once, and its reply
    stands in for the one before. What comes later is never seen, and neither is Flower's word that nothing will come.
    Nodes that have gone are not waited for.
    """
    presence = _Presence(grid)
    end = time.monotonic() + timeout_s
    waiting = _push(grid, messages)
    replies: list[Message] = []
    pause_s = FIRST_POLL_S
    while waiting:
        again: list[Message] = []
        came = _pull(grid, waiting)
        for asked, reply in came:
            message = None if follow_up is None else follow_up(asked, reply)
            if message is None:
                replies.append(reply)
            else:
                again.append(message)
        waiting |= _push(grid, again)
        waiting = presence.still_there(waiting)
        if not waiting or time.monotonic() > end:
            break
        if not again:
            pause_s = FIRST_POLL_S if came else min(2 * pause_s, LAST_POLL_S)
            time.sleep(min(pause_s, max(0.0, end - time.monotonic())))
    order = {message.metadata.dst_node_id: place for place, message in enumerate(messages)}
    return sorted(replies, key=lambda reply: order.get(reply.metadata.src_node_id, len(order)))


class _Presence:
    """Which nodes are there; one counts as gone when it is missing twice in a row, so that its last reply is pulled."""

    def __init__(self, grid: Grid) -> None:
        self._grid, self._asked, self._missing = grid, time.monotonic(), set[int]()

    def still_there(self, waiting: dict[str, Message]) -> dict[str, Message]:
        """Return the messages whose nodes are not gone."""
        if not waiting or time.monotonic() - self._asked < PRESENCE_S:
            return waiting
        self._asked, before = time.monotonic(), self._missing
        self._missing = {message.metadata.dst_node_id for message in waiting.values()} - set(self._grid.get_node_ids())
        gone = before & self._missing
        return {name: message for name, message in waiting.items() if message.metadata.dst_node_id not in gone}


def _push(grid: Grid, messages: Sequence[Message]) -> dict[str, Message]:
    """Return the messages by the ids that they were given; one that was not accepted gets none."""
    # A list: a deployed grid cannot send a generator.
    ids = list(grid.push_messages(list(messages))) if messages else []
    return {name: message for name, message in zip(ids, messages, strict=False) if name}


def _pull(grid: Grid, waiting: dict[str, Message]) -> list[tuple[Message, Message]]:
    """Return the messages whose replies have come, with them, and no longer wait for them."""
    came = [reply for reply in grid.pull_messages(set(waiting)) if reply.metadata.reply_to_message_id in waiting]
    pairs = [(waiting[reply.metadata.reply_to_message_id], reply) for reply in came]
    for reply in came:
        waiting.pop(reply.metadata.reply_to_message_id, None)
    return [(asked, reply) for asked, reply in pairs if not (reply.has_error() and reply.error.code in NO_REPLY_CODES)]
