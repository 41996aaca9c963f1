"""Inventory: what real QEMUs say of themselves, and every reason why one cannot be moved, with its remedy."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from migd.errors import Refused
from migd.guest.control import GuestState
from migd.lab.emulators import Emulator
from migd.qemu import inventory
from migd.qemu.inventory import Backend, Inventory
from migd.qemu.memo import Memo, MemoStore
from migd.qemu.ram_map import RamMap
from tests.support.qemu import HINT_PORT, MIB, Hatchery, Qemu

NO_PROCESS = "no other process can read it"
USE_FILE = r"-object memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/NAME,share=on -machine "


async def examined(qemu: Qemu) -> Inventory:
    async with qemu.monitor() as monitor:
        return await inventory.examine(monitor)


def backend(words: str) -> tuple[str, ...]:
    return ("-object", f"{words},id=ram,size={{size}}", "-machine", "{machine},memory-backend=ram")


# -- what can be moved ----------------------------------------------------------------------------------


async def test_a_qemu_with_all_that_migd_wants_is_described(qemus: Hatchery, emulator: Emulator) -> None:
    qemu = qemus.start(*HINT_PORT)
    found = await examined(qemu)
    assert found.version == emulator.version
    assert found.name == str(emulator)
    assert found.machine == f"pc-i440fx-{emulator.version[0]}.{emulator.version[1]}"
    assert found.run_state == "running"
    assert found.backends == (Backend("ram", "memory-backend-file", 64 * MIB, True, str(qemu.ram)),)
    assert sorted(found.devices) == ["virtio-serial-pci", "virtserialport"]
    assert found.hint_socket == str(qemu.hints)
    assert (found.blocked, found.memos, found.direct_drives) == ((), (), ())
    assert (found.balloon_bytes, found.reports_free) == (0, False)
    assert (found.obstacles(), found.untracked()) == ([], "")
    assert RamMap.parse(found.mtree, {"ram": (0, 64 * MIB)}).end == 64 * MIB


@pytest.mark.parametrize(
    ("words", "run_state"),
    [((), "running"), (("-S",), "prelaunch"), (("-incoming", "defer"), "inmigrate")],
    ids=["running", "not started", "incoming"],
)
async def test_the_state_of_the_guest_is_qemus(
    new_qemus: Hatchery, words: Sequence[str], run_state: str
) -> None:
    found = await examined(new_qemus.start(*words))
    assert (found.run_state, found.obstacles()) == (run_state, [])


async def test_the_version_of_the_machine_type_is_in_its_name(new_qemus: Hatchery) -> None:
    assert (await examined(new_qemus.start(machine="pc-q35-7.2"))).machine == "pc-q35-7.2"


async def test_several_backends_are_named_in_order(qemus: Hatchery) -> None:
    """Memory that is plugged in, too: what matters is that source and destination have the same order."""
    qemu = qemus.start(
        *("-m", "64M,slots=2,maxmem=1G"),
        *("-object", "memory-backend-file,id=more,size=128M,mem-path={dir}/more,share=on"),
        *("-device", "pc-dimm,memdev=more"),
    )
    found = await examined(qemu)
    assert [(each.id, each.bytes, each.path) for each in found.backends] == [
        ("more", 128 * MIB, str(qemu.directory / "more")),
        ("ram", 64 * MIB, str(qemu.ram)),
    ]
    assert found.obstacles() == []
    places = RamMap.parse(found.mtree, {"more": (0, 128 * MIB), "ram": (128 * MIB, 64 * MIB)})
    assert places.end == (4 << 30) + 128 * MIB


async def test_memos_of_migd_are_found_among_other_objects(qemus: Hatchery) -> None:
    qemu = qemus.start("-object", "secret,id=other,data=x")
    async with qemu.monitor() as monitor:
        await MemoStore(monitor, ()).write(Memo(GuestState.RUNNING))
        assert (await inventory.examine(monitor)).memos == ("migd-memo-1",)


# -- RAM that cannot be moved ---------------------------------------------------------------------------

RAM: list[tuple[str, Sequence[str], str]] = [
    ("no backend at all", (), rf"^RAM pc.ram is a memory-backend-ram, {NO_PROCESS}: use {USE_FILE}"),
    ("no file", backend("memory-backend-ram,share=on"),
     rf"^RAM ram is a memory-backend-ram.*: use {USE_FILE}"),
    ("private file", backend("memory-backend-file,mem-path={ram}"),
     r"^RAM ram is share=off, so that no other process sees it: add share=on"),
    ("private file by -mem-path", ("-mem-path", "{dir}"), r"^RAM pc.ram is share=off, .*: add share=on"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ram", "reason"), RAM, ids=[row[0] for row in RAM])
async def test_ram_that_cannot_be_moved_is_named_with_a_remedy(
    qemus: Hatchery, name: str, ram: Sequence[str], reason: str
) -> None:
    (found,) = (await examined(qemus.start(ram=ram))).obstacles()
    with pytest.raises(Refused, match=reason):
        raise Refused(found)


async def test_a_memfd_is_ram_that_newer_qemus_send_by_themselves(
    qemus: Hatchery, emulator: Emulator
) -> None:
    found = await examined(qemus.start(ram=backend("memory-backend-memfd")))
    if emulator.version < (8,):
        assert found.obstacles() == []
    else:
        assert found.obstacles() == [f"RAM ram: this QEMU sends a memfd itself: use {USE_FILE}TYPE,"
                                     "memory-backend=ram"]  # fmt: skip


async def test_each_of_two_backends_has_its_own_reason(qemus: Hatchery) -> None:
    found = await examined(
        qemus.start(
            *("-object", "memory-backend-file,id=m0,size=32M,mem-path={dir}/m0"),
            *("-object", "memory-backend-ram,id=m1,size=32M"),
            *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1"),
            ram=(),
        )
    )
    first, second = found.obstacles()
    assert first.startswith("RAM m0 is share=off")
    assert second.startswith("RAM m1 is a memory-backend-ram")


# -- devices --------------------------------------------------------------------------------------------

SHARED_MEMORY = ("-object", "memory-backend-file,id=shm,size=16M,mem-path={dir}/shm,share=on")
DRIVE = ("-drive", "if=none,id=d,file={dir}/../disk,format=raw")

DEVICES: list[tuple[str, Sequence[str], list[str]]] = [
    ("ivshmem", (*SHARED_MEMORY, "-device", "ivshmem-plain,memdev=shm"),
     ["device ivshmem-plain: its memory, or its writes, are not seen here: unplug it (device_del)",
      "QEMU itself refuses: Migration is disabled when using feature 'peer mode' in device 'ivshmem'"]),
    ("virtio-pmem", ("-m", "64M,slots=2,maxmem=1G", *SHARED_MEMORY, "-device", "virtio-pmem-pci,memdev=shm"),
     ["device virtio-pmem-pci: its memory, or its writes, are not seen here: unplug it (device_del)"]),
    ("a device that QEMU does not migrate", (*DRIVE, "-device", "nvme,serial=a,drive=d"),
     ["QEMU itself refuses: non-migratable device: 0000:00:02.0/nvme"]),
]  # fmt: skip


@pytest.fixture
def disk(place: Path) -> Path:
    """Beside the directories of QEMUs."""
    path = place / "disk"
    path.write_bytes(bytes(MIB))
    return path


@pytest.mark.parametrize(("name", "words", "reasons"), DEVICES, ids=[row[0] for row in DEVICES])
async def test_devices_that_cannot_be_moved_are_named(
    qemus: Hatchery, disk: Path, name: str, words: Sequence[str], reasons: list[str]
) -> None:
    assert (await examined(qemus.start(*words))).obstacles() == reasons


def takes_direct_io(directory: Path) -> bool:
    path = directory / "direct"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture
def direct_disk(place: Path, tmp_path: Path) -> Path:
    for directory in (place, tmp_path):
        if takes_direct_io(directory):
            (directory / "disk").write_bytes(bytes(MIB))
            return directory / "disk"
    pytest.skip("no directory here has files that bypass the page cache")


@pytest.mark.parametrize(
    "words",
    [
        ("-drive", "if=none,id=d,file={disk},format=raw,cache=none"),
        (
            *("-blockdev", "driver=file,node-name=f,filename={disk},cache.direct=on"),
            *("-blockdev", "driver=raw,node-name=d,file=f,cache.direct=on"),
        ),
        (  # what is on top does not tell
            *("-blockdev", "driver=file,node-name=f,filename={disk},cache.direct=on"),
            *("-blockdev", "driver=raw,node-name=d,file=f"),
        ),
    ],
    ids=["drive", "nodes", "lower node only"],
)
async def test_a_drive_past_the_page_cache_rules_out_tracking_and_nothing_else(
    qemus: Hatchery, direct_disk: Path, words: Sequence[str]
) -> None:
    filled = [word.replace("{disk}", str(direct_disk)) for word in words]
    found = await examined(qemus.start(*filled, "-device", "virtio-blk-pci,drive=d"))
    assert found.obstacles() == []
    assert found.direct_drives == (str(direct_disk),)
    assert found.untracked() == (
        f"{direct_disk}: with cache=none devices write to guest memory past the kernel's write tracking "
        "(set cache.direct=off, or cache=writeback)"
    )


async def test_a_drive_through_the_page_cache_and_an_empty_one_are_tracked(
    qemus: Hatchery, disk: Path
) -> None:
    found = await examined(
        qemus.start(
            *DRIVE, "-device", "virtio-blk-pci,drive=d", "-device", "ide-cd", "-cdrom", "{dir}/errors"
        )
    )
    assert (found.direct_drives, found.obstacles(), found.untracked()) == ((), [], "")


@pytest.mark.parametrize(("reporting", "reports"), [("off", False), ("on", True)])
async def test_a_balloon_may_stand_still_but_not_report_free_pages(
    qemus: Hatchery, reporting: str, reports: bool
) -> None:
    found = await examined(qemus.start("-device", f"virtio-balloon-pci,free-page-reporting={reporting}"))
    assert (found.balloon_bytes, found.reports_free, found.obstacles()) == (64 * MIB, reports, [])
    assert ("free-page-reporting=off" in found.untracked()) is reports


# -- the hint port --------------------------------------------------------------------------------------

SERIAL = ("-device", "virtio-serial-pci,id=vs")


def port(chardev: str, name: str = "org.migd.hints.0") -> tuple[str, ...]:
    return (
        *SERIAL,
        *("-chardev", f"{chardev},id=h"),
        "-device",
        f"virtserialport,bus=vs.0,chardev=h,name={name}",
    )


async def test_the_socket_of_the_port_is_found_whether_somebody_is_connected_or_not(qemus: Hatchery) -> None:
    qemu = qemus.start(*HINT_PORT)
    async with qemu.monitor() as monitor:
        assert (await inventory.examine(monitor)).hint_socket == str(qemu.hints)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(qemu.hints))
            # It is accepted when QEMU's loop comes round.
            while "disconnected" in (await monitor.ask("query-chardev"))[0]["filename"]:
                pass
            assert (await inventory.examine(monitor)).hint_socket == str(qemu.hints)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ""),
        (SERIAL, ""),
        ((*SERIAL, "-device", "virtserialport,bus=vs.0,name=org.migd.hints.0"), ""),
        (port("socket,path={dir}/p,server=on,wait=off", "org.qemu.guest_agent.0"), ""),
        (port("pty", "org.qemu.guest_agent.0"), ""),
        (port("socket,path={dir}/a,,b,server=on,wait=off"), "{dir}/a,b"),
        (port("socket,path=relative,server=on,wait=off"), "relative"),
    ],
    ids=[
        "no device",
        "no port",
        "no chardev",
        "another port",
        "another port, no socket",
        "comma",
        "relative",
    ],
)
async def test_a_socket_is_the_one_of_migds_port_and_no_other(
    new_qemus: Hatchery, words: Sequence[str], expected: str
) -> None:
    qemu = new_qemus.start(*words)
    assert (await examined(qemu)).hint_socket == expected.replace("{dir}", str(qemu.directory))


@pytest.mark.parametrize(
    ("chardev", "told"),
    [
        ("pty", "pty:/dev/pts/"),
        ("null", "null"),
        ("file,path={dir}/out", "file"),
        ("socket,host=127.0.0.1,port=0,server=on,wait=off", "disconnected:tcp:127.0.0.1:"),
        ("socket,path={dir}/../theirs", "unix:.*"),
    ],
    ids=["pty", "null", "file", "tcp", "a socket of somebody else"],
)
async def test_a_port_that_migd_cannot_connect_to_is_refused_with_the_words_to_use(
    new_qemus: Hatchery, place: Path, chardev: str, told: str
) -> None:
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(place / "theirs"))
        theirs.listen()
        qemu = new_qemus.start(*port(chardev))
        reason = (
            rf"chardev h of org.migd.hints.0 is {told}.*: make it a unix socket, "
            r"-chardev socket,id=h,path=PATH,server=on,wait=off"
        )
        with pytest.raises(Refused, match=reason):
            await examined(qemu)
