"""What is started is ended, with its children, however its parent ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.runtimes.processes import Processes, free_port, marked, program

SLEEPER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""
PARENT = """
import sys, time
from pathlib import Path
from experiments.runtimes.processes import Processes
with Processes(Path(sys.argv[1]), {}) as processes:
    processes.start("sleeper", [sys.executable, "-c", sys.argv[2]])
    print(processes.token, flush=True)
    time.sleep(600)
"""


def wait_until(is_so, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)
    assert is_so()


def test_everything_ends_with_the_block_grandchildren_in_sessions_of_their_own_too(tmp_path):
    with Processes(tmp_path, {}) as processes:
        processes.start("sleeper", [sys.executable, "-c", SLEEPER])
        wait_until(lambda: len(marked(processes.token)) == 2)
    assert marked(processes.token) == []


def test_everything_ends_when_the_parent_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), SLEEPER], stdout=subprocess.PIPE, text=True)
    token = parent.stdout.readline().strip()
    wait_until(lambda: len(marked(token)) >= 2)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: marked(token) == [])


def test_one_program_can_be_killed_with_its_group(tmp_path):
    with Processes(tmp_path, {}) as processes:
        processes.start("one", [sys.executable, "-c", "import time; time.sleep(600)"])
        processes.start("two", [sys.executable, "-c", "import time; time.sleep(600)"])
        processes.kill("one")
        processes.check("two")
        with pytest.raises(RuntimeError, match="one ended with exit code -9"):
            processes.check("one")
        processes.start("one", [sys.executable, "-c", "import time; time.sleep(600)"])
        processes.check("one")


def test_a_program_that_ended_by_itself_is_noticed_with_its_last_words(tmp_path):
    with Processes(tmp_path, {}) as processes:
        processes.start("short", [sys.executable, "-c", "print('good bye'); raise SystemExit(3)"])
        wait_until(lambda: "good bye" in processes.tail("short"))
        with pytest.raises(RuntimeError, match=r"short ended with exit code 3:\ngood bye"):
            wait_until(lambda: processes.check("short") is not None, limit_s=5)
        assert processes.wait("short", timeout_s=5) == 3
        processes.check("short")


def test_a_program_that_is_waited_for_too_long_is_an_error(tmp_path):
    with Processes(tmp_path, {}) as processes:
        processes.start("long", [sys.executable, "-c", "import time; time.sleep(600)"])
        with pytest.raises(RuntimeError, match="long still runs"):
            processes.wait("long", timeout_s=0.1)
        with pytest.raises(RuntimeError, match="did not end within"):
            processes.run([sys.executable, "-c", "import time; time.sleep(600)"], timeout_s=0.2)


def test_what_a_program_prints_is_returned_and_its_failure_is_told(tmp_path):
    with Processes(tmp_path, {"GREETING": "hello"}) as processes:
        assert processes.run([sys.executable, "-c", "import os; print(os.environ['GREETING'])"]) == "hello\n"
        with pytest.raises(RuntimeError, match="exit code 4: no"):
            processes.run([sys.executable, "-c", "import sys; print('no'); sys.exit(4)"])


def test_a_program_that_is_not_installed_is_named():
    with pytest.raises(RuntimeError, match="no-such-program is not installed"):
        program("no-such-program")


def test_a_free_port_can_be_bound():
    assert 1024 < free_port() < 65536
