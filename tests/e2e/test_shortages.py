"""Too little of something, or too much at once: the cause is named, the guest runs on, the next one works."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.control import commands
from migd.errors import MigdError
from migd.migration.state import DestinationState
from migd.ram.block import PAGE_BYTES
from tests.support import remains
from tests.support.fault_proxy import SLOW_BYTES_S, Fault, FaultProxy, Kind
from tests.support.pair import DaemonPair, DaemonProcess, daemon_pair, eventually, ram_digest

STORM = 40
FLAT_BYTES = 24 << 20
"""What a daemon may need at most beside a guest's RAM for frames in flight, however slow the network."""


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    """Daemons as they are shipped: what holds one in a phase would need a descriptor, too."""
    with daemon_pair(destination="[limits]\nbegin_s = 2\n") as pair:
        yield pair


def assert_runs_here(pair: DaemonPair, name: str) -> None:
    here = eventually(lambda: pair.source.guest(name), f"{name} at the source")
    assert here.state == "running"
    before = ram_digest(here.pid)
    eventually(lambda: ram_digest(here.pid) != before, f"{name} to write")


def assert_moves(pair: DaemonPair, name: str) -> None:
    eventually(lambda: pair.destination.guest(name) is None, f"the destination to forget {name}")
    pair.launch(name)
    assert pair.ended(name).state == "completed"
    assert pair.checked(name)[1] == 0
    pair.discard(name)


# -- descriptors --------------------------------------------------------------------------------------


def _open(daemon: DaemonProcess) -> list[int]:
    assert daemon.process is not None
    return [int(entry.name) for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir()]


@contextlib.contextmanager
def descriptors_left(daemon: DaemonProcess, count: int) -> Iterator[None]:
    """The daemon can open so many more."""
    assert daemon.process is not None
    pid, used = daemon.process.pid, set(_open(daemon))
    free = [number for number in range(max(used) + count + 2) if number not in used]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[count], before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def _is_over(pair: DaemonPair, name: str) -> bool:
    """As far as the daemon has a descriptor for whoever asks."""
    with contextlib.suppress(MigdError):
        return all(found.over for found in pair.source.migrations(name))
    return False


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize("role", ["source", "destination"])
def test_no_descriptor_left(pair: DaemonPair, role: str, left: int) -> None:
    """At whichever step of a migration that is noticed: connections, the guest's RAM, its process."""
    daemon = pair.source if role == "source" else pair.destination
    guest = pair.guest(ram="8Mi", workload="churn")
    name = guest.name
    assert pair.migrate(name, "--to", "127.0.0.1:1").exit_code == 1  # now everything is imported and opened
    with descriptors_left(daemon, left + 1):  # one for whoever asks
        with contextlib.suppress(MigdError):  # it may not even hear what is asked
            pair.launch(name)
        eventually(lambda: _is_over(pair, name), "the attempt to be over")
    assert [found.error for found in pair.source.migrations(name) if found.state != "failed"] == []
    assert_runs_here(pair, name)
    assert_moves(pair, name)


# -- memory -------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24M,mode=0700", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_shared_memory_that_fills_up_while_a_guest_arrives(small: Path) -> None:
    """Its RAM was promised, and somebody else takes it."""
    with daemon_pair(destination=f'[daemon]\nram = "{small}"\n', held=True) as pair:
        guest = pair.guest(ram="16Mi", workload="churn", live="0.8")
        pair.destination.hold(DestinationState.RECEIVING)
        pair.launch(guest.name, hints=False)
        pair.destination.wait_held(DestinationState.RECEIVING)
        hog = small / "hog"
        with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
            while file.write(bytes(PAGE_BYTES)):
                pass
        pair.destination.release_all()
        ended = pair.ended(guest.name)
        assert ended.state == "failed", ended
        assert os.strerror(28) in ended.error or "room" in ended.error, ended
        assert_runs_here(pair, guest.name)
        assert pair.destination.status().role == "destination"
        hog.unlink()
        assert_moves(pair, guest.name)


def _anonymous_bytes(daemon: DaemonProcess) -> int:
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


def test_a_slow_network_costs_time_and_no_memory(pair: DaemonPair) -> None:
    guest = pair.guest(ram="64Mi", workload="idle", live="0.8")
    slow = Fault(Kind.SLOW, 1)
    with contextlib.closing(FaultProxy(pair.address, slow)) as network:
        before = [_anonymous_bytes(pair.source), _anonymous_bytes(pair.destination)]
        pair.launch(guest.name, to=network.address, streams=1, compression="none", hints=False)
        eventually(
            lambda: pair.source.migrations(guest.name)[-1].moved_bytes > 5 * SLOW_BYTES_S, "some of it"
        )
        after = [_anonymous_bytes(pair.source), _anonymous_bytes(pair.destination)]
        assert pair.source.migrations(guest.name)[-1].state == "bulk"
        assert pair.cancel(guest.name).exit_code == 0
        assert pair.ended(guest.name).state == "cancelled"
    assert all(now - then < FLAT_BYTES for now, then in zip(after, before, strict=True)), (before, after)
    pair.discard(guest.name)


# -- too much at once -----------------------------------------------------------------------------------


def test_a_guest_that_is_asked_to_leave_twice_at_once(pair: DaemonPair) -> None:
    guest = pair.guest(ram="8Mi", workload="churn")
    pair.launch(guest.name, max_bandwidth_bytes_s=100_000, hints=False, compression="none")
    again = pair.source.client.ask_once(commands.Migrate(guest=guest.name, to=pair.address, detach=True))
    assert isinstance(again, commands.Failed), again
    assert (again.exit_code, "is in a migration already" in again.error) == (3, True)
    assert pair.cancel(guest.name).exit_code == 0
    assert pair.ended(guest.name).state == "cancelled"
    assert_moves(pair, guest.name)


def test_a_storm_of_starts_and_cancels(pair: DaemonPair) -> None:
    """Each is cancelled as soon as it has begun, wherever it then is."""
    guest = pair.guest(ram="8Mi", workload="churn")
    before = remains.ready(pair)
    for _ in range(STORM):
        migration = pair.launch(guest.name, max_bandwidth_bytes_s=100_000, hints=False, compression="none")
        reply = pair.source.client.ask_once(commands.Cancel(target=migration))
        assert isinstance(reply, commands.Done), reply
        assert pair.ended(guest.name).state == "cancelled"
    assert_runs_here(pair, guest.name)
    eventually(lambda: remains.remains(pair) == before, "nothing to be left")
    assert_moves(pair, guest.name)
    assert remains.bugs(pair.source) == remains.bugs(pair.destination) == []
