"""Programs that a runtime starts, and that must not outlive it, however it ends.

Flower's programs start others, and Ray's leave their parent's process group, so what belongs together is told by a
mark in the environment, which children inherit. A watchdog, told by its closed input that the parent has died, ends
all that carry the mark: even a parent that is killed leaves nothing behind. The mark is read from /proc, that is on
Linux; elsewhere the programs themselves are ended, and what they started with them as far as they see to it.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

MARK = "FEDRACLORA_PROCESSES"
GRACE_S = 5.0


class Processes:
    """Programs with a log file each in `logs`; all end with the `with` block."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.logs = logs
        self.token = secrets.token_hex(16)
        # Flower's programs start one another by name.
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        self._environment = {**os.environ, **environment, "PATH": search, MARK: self.token}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Processes":
        """Start the watchdog."""
        self.logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, self.token]
        self._watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End everything: first what was started here, in order, then by the watchdog whatever is left of it."""
        for process in self._running.values():
            process.terminate()
        _wait(lambda: all(process.poll() is not None for process in self._running.values()), GRACE_S)
        if self._watchdog is not None and self._watchdog.stdin is not None:
            self._watchdog.stdin.close()
            self._watchdog.wait()
        for process in self._running.values():
            process.kill()
            process.wait()

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a program under a name; its output goes to `<name>.log`."""
        with (self.logs / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C in the terminal must reach us alone, so that we end things in order.
            self._running[name] = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def run(self, command: Sequence[str], *, timeout_s: float = 120.0) -> str:
        """Run a program to its end and return what it printed. Raises RuntimeError where it fails or takes too long."""
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command)} did not end within {timeout_s:g} seconds") from error
        if done.returncode:
            output = (done.stdout + done.stderr).strip()
            raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}: {output}")
        return done.stdout

    def kill(self, name: str) -> None:
        """Kill a program at once, and what it started in its own session."""
        process = self._running[name]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def wait(self, name: str, *, timeout_s: float) -> int:
        """Return a program's exit code once it has ended. Raises RuntimeError where it does not in time."""
        try:
            code = self._running[name].wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{name} still runs after {timeout_s:g} seconds:\n{self.tail(name)}") from error
        del self._running[name]
        return code

    def check(self, name: str) -> None:
        """Raise RuntimeError where a program that was started has ended."""
        process = self._running.get(name)
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{name} ended with exit code {process.returncode}:\n{self.tail(name)}")

    def tail(self, name: str, num_lines: int = 30) -> str:
        """Return the last lines that a program wrote."""
        path = self.logs / f"{name}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-num_lines:])


def program(name: str) -> str:
    """Return the path of a program of this Python environment. Raises RuntimeError where it is not installed."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise RuntimeError(f"{name} is not installed beside {sys.executable}; it comes with pip install flwr")
    return str(path)


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def marked(token: str) -> list[int]:
    """Return the ids of the processes that carry a mark, none where /proc does not say."""
    mark = f"{MARK}={token}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def end_marked(token: str) -> None:
    """End every process that carries a mark, at once; more than one pass, because they may be starting others."""
    for _ in range(20):
        waiting = [process for process in marked(token) if process != os.getpid()]
        if not waiting:
            return
        for process in waiting:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def _wait(is_done: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not is_done() and time.monotonic() < end:
        time.sleep(0.1)


def _watch(token: str) -> None:
    """Wait until the parent closes our input, willingly or by dying, and end what it started."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        pass
    end_marked(token)


if __name__ == "__main__":
    _watch(sys.argv[1])
