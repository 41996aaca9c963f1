"""What the doctor says of the kernel, by the kernel, or with a system call taken away; and of its clock."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from migd.doctor import clock, kernel
from migd.doctor.clock import Discipline
from migd.doctor.finding import Level
from migd.doctor.system import System
from tests.doctor.reading import FAIL, OK, WARN, diagnosis, system
from tests.support.pair import Output

NUMBERS = {"x86_64": (323, 319, 434), "aarch64": (282, 279, 434)}
"""Of the system calls userfaultfd, memfd_create and pidfd_open."""


def test_two_writes_are_seen_and_no_more() -> None:
    with kernel.RamMapping() as mapping:
        try:
            assert mapping.logged_writes() == [1, 3]
            assert mapping.logged_writes() == [1, 3]
        except OSError as error:
            pytest.skip(f"this kernel has no write tracking: {error}")
    assert kernel.write_tracking("auto").level is OK
    assert "not used" in kernel.write_tracking("compare").found


@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="numbers of system calls unknown")
@pytest.mark.parametrize(
    ("which", "dirty_log", "check", "level"),
    [
        (0, "auto", "write tracking", WARN),
        (0, "userfaultfd", "write tracking", FAIL),
        (1, "auto", "sealed memory", FAIL),
        (2, "auto", "pidfd", FAIL),
    ],
)
def test_a_system_call_that_is_not_there(
    tmp_path: Path, which: int, dirty_log: str, check: str, level: Level
) -> None:
    number = NUMBERS[platform.machine()][which]
    config = tmp_path / "config.toml"
    config.write_text(f'[destination]\nlisten = "127.0.0.1:0"\n[migration]\ndirty_log = "{dirty_log}"\n')
    command = [sys.executable, "-m", "tests.support.denied", str(number), "migd", "doctor", "--json"]
    done = subprocess.run(
        [*command, "--config", str(config), "--runtime-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "no filter of system calls" in done.stderr:
        pytest.skip("this kernel has no seccomp")
    found = diagnosis(Output(done.returncode, done.stdout, done.stderr))
    assert done.returncode == (level is FAIL), done.stderr
    assert found[check].level is level
    assert "Function not implemented" in found[check].found


def test_the_switch_that_does_not_matter(tmp_path: Path) -> None:
    name = "proc/sys/vm/unprivileged_userfaultfd"
    assert kernel.user_faults(System(tmp_path)).found == "not there"
    assert kernel.user_faults(system(tmp_path, {name: "0\n"})).found == "0"


# -- clocks -------------------------------------------------------------------------------------------------


def test_the_kernels_clock_is_asked() -> None:
    found = clock.discipline()
    assert isinstance(found.synchronised, bool)
    assert 0 <= found.largest_error_s < 3600
    assert clock.synchronisation() == clock.judge(clock.discipline())


@pytest.mark.parametrize(
    ("discipline", "level", "text"),
    [
        (Discipline(synchronised=True, largest_error_s=0.002), OK, "wrong by at most 2 ms"),
        (Discipline(synchronised=True, largest_error_s=0.5), WARN, "wrong by at most 500 ms"),
        (Discipline(synchronised=False, largest_error_s=0.0), WARN, "not synchronised"),
    ],
)
def test_how_good_a_clock_is(discipline: Discipline, level: Level, text: str) -> None:
    found = clock.judge(discipline)
    assert found.level is level
    assert text in found.found
