"""QEMU's migration settings, set and set back, and the memos that outlive whoever wrote them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest

from migd.errors import GuestError, Refused
from migd.guest.control import GuestState
from migd.qemu import inventory
from migd.qemu.memo import Memo, MemoStore
from migd.qemu.monitor import CommandRefused, Monitor
from migd.qemu.settings import Settings
from tests.support.qemu import Hatchery, Qemu

MIGRATION = "0123456789abcdef" * 2


@pytest.fixture
def qemu(qemus: Hatchery) -> Qemu:
    return qemus.start()


@pytest.fixture
async def monitor(qemu: Qemu) -> AsyncIterator[Monitor]:
    async with qemu.monitor() as monitor:
        yield monitor


async def everything(monitor: Monitor) -> tuple[list[Any], Mapping[str, Any]]:
    """All that QEMU says of its migration settings."""
    capabilities = await monitor.ask("query-migrate-capabilities")
    return capabilities, await monitor.ask("query-migrate-parameters")


async def configure(monitor: Monitor, *capabilities: str, **parameters: object) -> None:
    listed = [{"capability": name, "state": True} for name in capabilities]
    await monitor.ask("migrate-set-capabilities", {"capabilities": listed})
    await monitor.ask(
        "migrate-set-parameters", {key.replace("_", "-"): parameters[key] for key in parameters}
    )


# -- settings -------------------------------------------------------------------------------------------


async def test_under_migds_settings_ram_stays_out_and_nothing_else_is_special(monitor: Monitor) -> None:
    await configure(monitor, "multifd", "auto-converge", max_bandwidth=1_000_000, tls_creds="theirs")
    ours = (await Settings.of(monitor)).for_migd()
    await ours.apply(monitor)
    assert await Settings.of(monitor) == ours
    assert {name for name, on in ours.capabilities.items() if on} == {"x-ignore-shared", "events"}
    assert (ours.max_bandwidth, ours.tls_creds) == (1 << 40, "")


@pytest.mark.parametrize(
    ("capabilities", "parameters"),
    [
        ((), {}),
        (("multifd", "return-path"), {"max_bandwidth": 12_345_678, "multifd_channels": 7}),
        (("x-ignore-shared", "events"), {"max_bandwidth": (1 << 62) + 1, "tls_creds": "theirs"}),
        (
            ("xbzrle", "auto-converge", "postcopy-blocktime"),
            {"downtime_limit": 77, "cpu_throttle_increment": 33},
        ),
    ],
    ids=["its defaults", "several streams", "migds own", "others"],
)
async def test_qemus_own_settings_come_back_exactly(
    monitor: Monitor, capabilities: tuple[str, ...], parameters: dict[str, object]
) -> None:
    await configure(monitor, *capabilities, **parameters)
    before = await everything(monitor)
    own = await Settings.of(monitor)
    await own.for_migd().apply(monitor)
    assert await everything(monitor) != before or set(capabilities) == {"x-ignore-shared", "events"}
    await own.apply(monitor)
    assert await everything(monitor) == before
    assert await Settings.of(monitor) == own


async def test_a_qemu_that_cannot_leave_ram_out_is_refused(monitor: Monitor) -> None:
    own = await Settings.of(monitor)
    older = msgspec.structs.replace(own, capabilities={"events": False, "xbzrle": True})
    with pytest.raises(Refused, match=r"this QEMU cannot leave RAM out of a migration \(x-ignore-shared\)"):
        older.for_migd()


async def test_settings_stay_as_they_are_while_qemu_migrates_by_itself(monitor: Monitor) -> None:
    own = await Settings.of(monitor)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await monitor.lend("out", theirs.fileno())
        await monitor.ask("migrate", {"uri": "fd:out"})  # to somebody who does not read
        with pytest.raises(CommandRefused, match="QEMU refused migrate-set-capabilities: "):
            await own.for_migd().apply(monitor)
        assert await Settings.of(monitor) == own
        await monitor.ask("migrate_cancel")


# -- memos ----------------------------------------------------------------------------------------------


async def found(monitor: Monitor) -> tuple[str, ...]:
    return (await inventory.examine(monitor)).memos


async def remembered(monitor: Monitor) -> Memo | None:
    """What somebody who comes new to this QEMU reads."""
    return await MemoStore(monitor, await found(monitor)).read()


async def test_nothing_is_remembered_of_a_new_qemu(monitor: Monitor) -> None:
    assert await remembered(monitor) is None
    await MemoStore(monitor, ()).write(None)
    assert await found(monitor) == ()


@pytest.mark.parametrize("state", list(GuestState))
async def test_a_memo_is_read_as_it_was_written_by_whoever_comes_next(qemu: Qemu, state: GuestState) -> None:
    async with qemu.monitor() as first:
        memo = Memo(state, MIGRATION, await Settings.of(first), holds_still=True)
        await MemoStore(first, ()).write(memo)
    async with qemu.monitor() as second:  # the first one is gone
        assert await remembered(second) == memo


async def test_a_memo_takes_the_place_of_the_one_before(monitor: Monitor) -> None:
    memos = MemoStore(monitor, ())
    for number in range(1, 5):
        memo = Memo(GuestState.PAUSED, f"{number:032x}")
        await memos.write(memo)
        assert await found(monitor) == (f"migd-memo-{number}",)
        assert await remembered(monitor) == memo
    await memos.write(None)
    assert await found(monitor) == ()
    await memos.write(Memo(GuestState.RUNNING))  # and again from the beginning
    assert await remembered(monitor) == Memo(GuestState.RUNNING)


async def put(monitor: Monitor, name: str, data: str | bytes) -> None:
    text = data if isinstance(data, str) else data.decode()
    await monitor.ask("object-add", {"qom-type": "secret", "id": name, "data": text})


async def test_of_several_memos_the_newest_counts_and_the_next_one_takes_the_place_of_all(
    monitor: Monitor,
) -> None:
    """Whoever wrote them was killed before it had removed the older ones. 10 is newer than 9."""
    for number in (9, 10, 2):
        await put(
            monitor, f"migd-memo-{number}", msgspec.json.encode(Memo(GuestState.PAUSED, f"{number:032x}"))
        )
    memos = MemoStore(monitor, await found(monitor))
    assert await memos.read() == Memo(GuestState.PAUSED, f"{10:032x}")
    await memos.write(Memo(GuestState.RUNNING))
    assert await found(monitor) == ("migd-memo-11",)
    await memos.write(None)
    assert await found(monitor) == ()


async def test_a_memo_that_somebody_else_removed_is_no_error(monitor: Monitor) -> None:
    memos = MemoStore(monitor, ())
    await memos.write(Memo(GuestState.PAUSED))
    await monitor.ask("object-del", {"id": "migd-memo-1"})
    await memos.write(Memo(GuestState.RUNNING))
    assert await remembered(monitor) == Memo(GuestState.RUNNING)


async def test_a_memo_that_could_not_be_written_leaves_the_one_before(monitor: Monitor) -> None:
    memos = MemoStore(monitor, ())
    paused = Memo(GuestState.PAUSED, MIGRATION)
    await memos.write(paused)
    await put(monitor, "migd-memo-2", "of somebody else")
    with pytest.raises(CommandRefused, match=r"QEMU refused object-add: .*migd-memo-2"):
        await memos.write(Memo(GuestState.RUNNING))
    await monitor.ask("object-del", {"id": "migd-memo-2"})
    assert await remembered(monitor) == paused
    await memos.write(Memo(GuestState.INCOMING))  # it is not refused for good
    assert await remembered(monitor) == Memo(GuestState.INCOMING)
    await memos.write(None)
    assert await found(monitor) == ()


@pytest.mark.parametrize(
    "data",
    [
        '{"state":"paused","migration":"","more":1}',
        '{"state":"asleep"}',
        '{"state":"paused","settings":{"capabilities":{}}}',
        '{"migration":""}',
        "no JSON",
    ],
    ids=["another field", "another state", "fewer settings", "no state", "no JSON"],
)
async def test_a_memo_of_another_version_is_not_guessed_at(monitor: Monitor, data: str) -> None:
    await put(monitor, "migd-memo-3", data)
    with pytest.raises(GuestError, match="migd-memo-3 in QEMU is of another version of migd: "):
        await remembered(monitor)
    assert await found(monitor) == ("migd-memo-3",)


async def test_neither_is_one_with_another_kind_of_name(monitor: Monitor) -> None:
    await put(monitor, "migd-memo-x", "{}")
    with pytest.raises(GuestError, match="migd-memo-x in QEMU is of another version of migd"):
        await remembered(monitor)


async def test_the_end_of_qemu_is_told(qemu: Qemu, monitor: Monitor) -> None:
    memos = MemoStore(monitor, ())
    qemu.kill()
    with pytest.raises(GuestError, match="QEMU is gone: object-add was not answered"):
        await memos.write(Memo(GuestState.RUNNING))
    with pytest.raises(GuestError, match="QEMU is gone"):
        await Settings.of(monitor)
