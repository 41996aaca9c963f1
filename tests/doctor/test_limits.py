"""What the doctor says of memory, descriptors and TCP buffers, on this host and on others."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from migd.config import Config, MigrationConfig
from migd.doctor import ceilings, memory
from migd.doctor.finding import Level
from migd.doctor.system import System
from tests.doctor.reading import FAIL, OK, WARN, diagnosis, system
from tests.support.pair import Output

# -- memory -------------------------------------------------------------------------------------------------


def test_room_for_guests() -> None:
    found = memory.room("memfd")
    assert found.level in (OK, WARN)
    assert "MiB can be given" in found.found


def test_a_ram_directory_that_is_none() -> None:
    found = memory.room("/proc")
    assert found.level is FAIL
    assert "neither on tmpfs nor on hugetlbfs" in found.found


MEMINFO = "MemAvailable:    8388608 kB\nSwapTotal:        {swap} kB\nHugePages_Total:    {pages}\n" \
    "HugePages_Free:     {free}\nHugepagesize:       2048 kB\n"  # fmt: skip


@pytest.mark.parametrize(
    ("pages", "free", "ram", "level"),
    [
        (0, 0, "memfd", OK),
        (8, 8, "memfd", WARN),
        (8, 8, "hugetlb", OK),
        (8, 3, "memfd", OK),
        (8, 8, "/mnt", OK),
    ],
)
def test_huge_pages(tmp_path: Path, pages: int, free: int, ram: str, level: Level) -> None:
    files = {"proc/meminfo": MEMINFO.format(swap=0, pages=pages, free=free)}
    found = memory.huge_pages(system(tmp_path, files), ram)
    assert (found.level, found.found) == (level, f"{free} of {pages} free")
    assert level is OK or "16 MiB" in found.meaning


@pytest.mark.parametrize(("kib", "level", "text"), [(0, OK, "none"), (2 << 20, WARN, "2048 MiB")])
def test_swap(tmp_path: Path, kib: int, level: Level, text: str) -> None:
    found = memory.swap(system(tmp_path, {"proc/meminfo": MEMINFO.format(swap=kib, pages=0, free=0)}))
    assert (found.level, found.found) == (level, text)


V2, V1 = "0::/user/migd\n", "5:devices:/\n4:cpu,memory:/user/migd\n0::/\n"
V1_LIMIT = "memory/user/migd/memory.limit_in_bytes"
V1_USAGE = "memory/user/migd/memory.usage_in_bytes"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("groups", "limits", "level", "text"),
    [
        (V2, {}, OK, "none"),
        (V2, {"user/migd/memory.max": "max", "user/migd/memory.current": 5}, OK, "none"),
        (V2, {"user/migd/memory.max": 2 * GIB, "user/migd/memory.current": GIB},
         WARN, "1024 MiB left in control group /user/migd, less"),
        (V2, {"user/memory.max": 2 * GIB, "user/memory.current": 3 * GIB},
         WARN, "0 MiB left in control group /user, less"),
        (V2, {"memory.max": 9 * GIB, "memory.current": 0}, OK, "9216 MiB left in control group /"),
        (V1, {V1_LIMIT: GIB, V1_USAGE: 0}, WARN, "1024 MiB left in control group /user/migd, less"),
        (V1, {V1_LIMIT: (1 << 63) - 4096, V1_USAGE: 0}, OK, "none"),
        ("", {}, OK, "none"),
    ],
)  # fmt: skip
def test_limits_of_control_groups(
    tmp_path: Path, groups: str, limits: dict[str, object], level: Level, text: str
) -> None:
    files = {f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in limits.items()}
    files |= {"proc/self/cgroup": groups, "proc/meminfo": MEMINFO.format(swap=0, pages=0, free=0)}
    found = memory.memory_limit(system(tmp_path, files))
    assert found.level is level
    assert found.found.startswith(text)


def test_this_hosts_own_files_can_be_read() -> None:
    """Whatever they say."""
    for check in (memory.swap, memory.memory_limit, lambda found: memory.huge_pages(found, "memfd")):
        assert check(System()).found


# -- ceilings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "level"), [(64, FAIL), (101, FAIL), (102, WARN), (191, WARN), (192, OK), (1 << 20, OK)]
)
def test_open_files(soft: int, level: Level) -> None:
    assert ceilings.descriptors(soft, soft).level is level


def test_open_files_as_a_shell_limits_them(tmp_path: Path) -> None:
    command = f"ulimit -Sn 64; exec {sys.executable} -m migd doctor --json --runtime-dir {tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    found = diagnosis(Output(done.returncode, done.stdout, done.stderr))["open files"]
    assert done.returncode == 1
    assert (found.level, found.found) == (FAIL, "64, enough for 0 guests and 64 streams")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert f"ulimit -n {min(hard if hard > 0 else 4096, 4096)}" in found.remedy


BUFFERS = {
    "proc/sys/net/ipv4/tcp_rmem": "4096 131072 33554432\n",
    "proc/sys/net/ipv4/tcp_wmem": "4096 16384 4194304\n",
}


@pytest.mark.parametrize(
    ("streams", "round_trip_s", "level", "carried"),
    [
        (1, 0.001, OK, "1 streams carry 2.10 GB/s at most over 1 ms"),
        (1, 0.002, WARN, "1 streams carry 1.05 GB/s at most over 2 ms"),
        (4, 0.002, OK, "4 streams carry 4.19 GB/s at most over 2 ms"),
        (2, 0.1, WARN, "2 streams carry 0.04 GB/s at most over 100 ms"),
        (1, None, OK, "1 streams carry 2.10 GB/s over, say, 1 ms"),
    ],
)
def test_tcp_buffers(
    tmp_path: Path, streams: int, round_trip_s: float | None, level: Level, carried: str
) -> None:
    config = Config(migration=MigrationConfig(streams=streams))
    found = ceilings.tcp_buffers(system(tmp_path, BUFFERS), config, round_trip_s)
    assert found.level is level
    assert carried in found.found


def test_tcp_buffers_that_nobody_tells(tmp_path: Path) -> None:
    assert ceilings.tcp_buffers(System(tmp_path), Config(), None).level is OK
