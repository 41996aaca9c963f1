"""However a script ends, what it had started ends with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from migd.api import processes
from tests.support.pair import eventually
from tests.support.script import left_behind

FORGETFUL = """
import sys, time
from migd import api
pair = api.start_pair()
pair.guest("vm1", ram="8Mi", workload="idle")
pair.migrate("vm1").check()
print("there", flush=True)
if sys.argv[1:]:
    time.sleep(60)
"""


def test_a_script_that_ends_without_closing_leaves_nothing(private: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "there\n", "")
    assert left_behind(private) == []


def test_a_script_that_is_interrupted_twice_leaves_nothing(private: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORGETFUL, "stay"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "there\n"
        script.send_signal(signal.SIGINT)
        eventually(lambda: len(left_behind(private)) < 6 or script.poll() is not None, "the end of a process")
        script.send_signal(signal.SIGINT)
        _, said = script.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    assert left_behind(private) == []


def test_an_interrupt_comes_after_what_must_not_be_left_half_done() -> None:
    done = []

    def work() -> None:
        with processes.interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_has_no_interrupts_to_defer() -> None:
    done = []

    def work() -> None:
        with processes.interrupts_deferred():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_a_process_that_has_ended_is_not_alive_and_takes_no_signal() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = processes.Process(child.pid)
        assert process.alive
        child.kill()
        eventually(lambda: not process.alive, "its end")  # a zombie, which is not alive
        process.signal(signal.SIGTERM)
    process.signal(signal.SIGTERM)
    assert not processes.Process(child.pid).alive


def test_what_ignores_the_polite_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_END_S", 0.1)
    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        processes.end([processes.Process(child.pid)])
    assert child.returncode == -signal.SIGKILL


LINGERING = """
import ctypes, os, threading, time

def linger():
    print("lingering", flush=True)
    time.sleep(60)
    os._exit(0)

threading.Thread(target=linger).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_child_that_is_half_gone_is_ended_and_reaped(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every daemon with threads is for a moment: its first thread and its environment are gone."""
    (private / "sitecustomize.py").write_text(LINGERING)
    monkeypatch.setenv("PYTHONPATH", str(private))
    family = processes.Family()
    log = private / "log"
    child = family.start(log, "serve")
    try:
        eventually(lambda: "lingering" in log.read_text(), "its second thread")
        eventually(lambda: processes._stat(child.pid)[0] == "Z", "the end of the first")
        with pytest.raises(ProcessLookupError):
            Path(f"/proc/{child.pid}/environ").read_bytes()
        family.end()
        assert child.returncode == -signal.SIGTERM
    finally:
        child.kill()
        child.wait()
