"""A SuperLink of our own on the loopback interface, ready to take runs."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.runtimes.flower import SUPERLINK, Address, environment, write_connection
from experiments.runtimes.processes import Processes, free_port, program

START_S = 120.0


@contextmanager
def start_superlink(
    folder: Path, options: Sequence[str], *, root_certificates: str | None, port: int | None = None
) -> Iterator[Processes]:
    """Start a SuperLink with its home and logs in `folder`, and end it with all it started.

    Raises RuntimeError with the end of its log where it does not come up.
    """
    port = port or free_port()
    write_connection(folder / "home", Address(f"127.0.0.1:{port}", root_certificates))
    with Processes(folder / "logs", environment(folder / "home")) as processes:
        processes.start(SUPERLINK, [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port), *options])
        _wait_for(processes, port)
        yield processes


def _wait_for(processes: Processes, port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        processes.check(SUPERLINK)
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the SuperLink does not answer after {START_S:g} seconds:\n{processes.tail(SUPERLINK)}")
