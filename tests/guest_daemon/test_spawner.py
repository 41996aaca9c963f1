"""Spawner: a stub in readiness becomes the guest it is told to be, and none is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migd.guest import control, spawner
from migd.guest.spawner import Spawner

MIGRATION = "5e" * 16


@contextlib.asynccontextmanager
async def spawning(
    tmp_path: Path, *command: str
) -> AsyncIterator[tuple[Spawner, asyncio.Queue[control.Attach]]]:
    """A spawner, and what the processes it starts say first."""
    path = tmp_path / "guest.sock"
    listener = control.new_socket()
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    said: asyncio.Queue[control.Attach] = asyncio.Queue()

    async def accept() -> None:
        while True:
            sock, _ = await loop.sock_accept(listener)
            with sock:
                sock.setblocking(True)
                packet = await asyncio.to_thread(control.receive_from_guest, sock)
                assert packet is not None
                assert isinstance(packet[0], control.Attach)
                said.put_nowait(packet[0])

    accepting = asyncio.create_task(accept())
    spawns = Spawner(command, path, tmp_path)
    try:
        yield spawns, said
    finally:
        spawns.close()
        accepting.cancel()
        await asyncio.wait({accepting})
        listener.close()


def looks_like(pid: int) -> tuple[str, Path]:
    """The name that ``ps`` shows, and where the output goes."""
    return Path(f"/proc/{pid}/comm").read_text().strip(), Path(f"/proc/{pid}/fd/1").readlink()


def has_ended(pid: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)


async def test_the_spare_becomes_the_guest(tmp_path: Path) -> None:
    async with spawning(tmp_path) as (spawns, said):
        spawns.prepare()
        spare = spawns._spare
        assert spare is not None
        process = spawns.spawn("vm1", MIGRATION)
        assert process is spare
        attach = await asyncio.wait_for(said.get(), 20)
        assert (attach.name, attach.migration, attach.pid) == ("vm1", MIGRATION, process.pid)
        assert attach.state is control.GuestState.INCOMING
        assert looks_like(process.pid) == ("migd:vm1", tmp_path / "guest-vm1.log")
        assert os.getsid(process.pid) == process.pid  # a Ctrl-C at the daemon's terminal is not for it
        end(process)


async def test_two_guests_at_once_need_no_second_spare(tmp_path: Path) -> None:
    async with spawning(tmp_path) as (spawns, said):
        spawns.prepare()
        first, second = spawns.spawn("vm1", MIGRATION), spawns.spawn("vm2", MIGRATION)
        names = {(await asyncio.wait_for(said.get(), 20)).name for _ in range(2)}
        assert names == {"vm1", "vm2"}
        assert first.pid != second.pid
        end(first)
        end(second)


async def test_a_spare_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawner, "_SPARE_AFTER_S", 0.01)
    async with spawning(tmp_path) as (spawns, _):
        process = spawns.spawn("vm1", MIGRATION)
        for _ in range(1000):
            if spawns._spare is None:
                await asyncio.sleep(0.01)
        assert spawns._spare is not None
        end(process)


async def test_a_spare_that_died_is_replaced(tmp_path: Path) -> None:
    async with spawning(tmp_path) as (spawns, said):
        spawns.prepare()
        assert spawns._spare is not None
        end(spawns._spare)
        process = spawns.spawn("vm1", MIGRATION)
        assert (await asyncio.wait_for(said.get(), 20)).pid == process.pid
        end(process)


def test_a_spare_whose_daemon_is_killed_ends(tmp_path: Path) -> None:
    """A daemon in a process of its own, so that nothing of it can tidy up."""
    program = (
        "import os, pathlib, signal, sys; from migd.guest.spawner import Spawner;"
        "s = Spawner((), pathlib.Path('guest.sock'), pathlib.Path('.')); s.prepare();"
        "print(s._spare.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    daemon = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, check=False
    )
    assert daemon.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not has_ended(int(daemon.stdout)):
        assert time.monotonic() < deadline, "the spare lives on"
        time.sleep(0.05)


async def test_a_configured_command_gets_its_words_replaced(tmp_path: Path) -> None:
    async with spawning(tmp_path, "echo", "{socket}", "{name}-x", "{migration}", "{other}") as (spawns, _):
        spawns.prepare()
        assert spawns._spare is None
        assert spawns.spawn("vm1", MIGRATION).wait(10) == 0
        said = (tmp_path / "guest-vm1.log").read_text()
        assert said == f"{tmp_path}/guest.sock vm1-x {MIGRATION} {{other}}\n"
