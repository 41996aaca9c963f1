"""Renews the seeds: ``python -m tests.fuzz.record`` records real migrations, of both sessions joined in one
process and of two daemons with a stub guest each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from migd.control import commands
from migd.control.commands import ENCODER
from migd.migration.convergence import Policy
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract
from migd.source.attempt import Compression, SourceOptions, Verify
from migd.wire import handshake, messages
from migd.wire.framing import FrameEncoder
from migd.wire.protocol import FrameType
from tests.fuzz import frames
from tests.fuzz.seeds import SEEDS
from tests.fuzz.tape import Connection, Tape
from tests.fuzz.taps import GuestTap, Heard, TcpTap
from tests.support.pair import ROOT, DaemonPair, daemon_pair, eventually
from tests.support.scripted_guest import ScriptedGuest, joined

_RELENTLESS = Policy(downtime_limit_s=1e-9, max_iterations=3)
_TEXT = b"What matters is sent, what does not stays behind. "

_INCOMING = """\
import sys
from migd.guest.options import GuestOptions
from migd.guest.stub import run_guest
sys.exit(run_guest(GuestOptions(daemon=sys.argv[1], name=sys.argv[2], incoming=sys.argv[3])))
"""


def record(directory: Path) -> None:
    """All seeds, into empty directories below this one."""
    for name in (
        "session",
        "replies",
        "hint-answers",
        "hint-requests",
        "from-guest",
        "to-guest",
        "requests",
        "answers",
        "journal",
        "history",
        "device-state",
        "config",
        "free-bitmap",
        "probe",
    ):
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / name).mkdir(parents=True)
    for compression in (Compression.LZ4, Compression.NONE):
        asyncio.run(_record_sessions(directory, compression))
    _record_daemons(directory)
    _record_questions(directory)


# -- both sessions in one process -----------------------------------------------------------------------


def _story(page: int, text: bytes = _TEXT) -> bytes:
    return (b"%d %s" % (page, text) * 400)[:PAGE_BYTES]


def _scripted(compression: Compression) -> ScriptedGuest:
    """A few pages that are written again, freed after they were sent, or zero: every kind of record."""
    guest = ScriptedGuest(owned=0, contract=FreeContract.ANYTHING)
    owned = range(24) if compression is Compression.LZ4 else range(5)
    for page in owned:
        guest.store(page, _story(page))
    guest.clear(40)
    guest.clear(41)

    def rewrite() -> None:
        guest.store(1, _story(1, b"Once more. "))
        guest.clear(2)
        guest.free(3)

    guest.at_harvest = {1: rewrite, 2: lambda: guest.store(0, _story(0, b"And again. "))}
    guest.scripted_hints.on_request = lambda epoch, sink: sink(epoch, guest.free_pages)
    return guest


async def _record_sessions(directory: Path, compression: Compression) -> None:
    for streams in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            async with joined(_scripted(compression), Path(scratch)) as sides:
                tap = TcpTap(sides.address)
                sides.address = await tap.start()
                options = SourceOptions(
                    streams=streams, policy=_RELENTLESS, compression=compression, verify=Verify.STRICT
                )
                result = await sides.migrate(options)
                assert (result.outcome, result.wrong_pages) == ("completed", 0), result
                await tap.stop()
                _keep_tape(directory, f"{compression}-{streams}", tap.heard)


def _keep_tape(directory: Path, name: str, heard: list[Heard]) -> None:
    answers = frames.cut(bytes(heard[0].back))
    accept = next(piece for piece in answers if piece.kind == FrameType.ACCEPT)
    token = msgspec.msgpack.decode(accept.metadata, type=messages.Accept).token
    tape = Tape(token, tuple(Connection(bytes(each.forth)) for each in heard))
    (directory / "session" / name).write_bytes(tape.packed())
    (directory / "replies" / name).write_bytes(heard[0].back)


# -- two daemons ----------------------------------------------------------------------------------------


def _record_daemons(directory: Path) -> None:
    with _taps() as (pair, outgoing, incoming):
        guest = pair.start_guest(
            "recorded", ram="1Mi", live="0.1", socket=outgoing[0], seed=7, fill="/dev/urandom"
        ).ready()
        output = pair.migrate("recorded", "--streams", "2", "--downtime-limit", "1")
        assert output.exit_code == 0, output
        guest.wait()
        pair.checked("recorded")
        eventually(lambda: any(b"checked" in data for data, _ in incoming[1].from_guest), "the check")
        _keep_talk(directory, outgoing[1], incoming[1])
        _keep_control(directory, pair)


@contextlib.contextmanager
def _taps() -> Iterator[tuple[DaemonPair, tuple[Path, GuestTap], tuple[Path, GuestTap]]]:
    """A pair with a tap in front of each guest socket."""
    with tempfile.TemporaryDirectory() as scratch:
        entry = Path(scratch) / "incoming.py"
        entry.write_text(_INCOMING)
        there = Path(scratch) / "there.sock"
        command = json.dumps([sys.executable, str(entry), str(there), "{name}", "{migration}"])
        with daemon_pair(destination=f"guest_command = {command}\n") as pair:
            here = Path(scratch) / "here.sock"
            taps = [
                GuestTap(here, pair.source.directory / "guest.sock"),
                GuestTap(there, pair.destination.directory / "guest.sock"),
            ]
            try:
                yield pair, (here, taps[0]), (there, taps[1])
            finally:
                pair.discard("recorded")
                for tap in taps:
                    tap.close()


def _keep_talk(directory: Path, outgoing: GuestTap, incoming: GuestTap) -> None:
    (directory / "hint-answers" / "churn").write_bytes(outgoing.hints.forth)
    (directory / "hint-requests" / "churn").write_bytes(outgoing.hints.back)
    (device_state, free_bitmap) = outgoing.blobs
    (directory / "device-state" / "churn").write_bytes(device_state)
    (directory / "free-bitmap" / "churn").write_bytes(free_bitmap)
    said = [*outgoing.from_guest, *incoming.from_guest]
    told = [*outgoing.from_daemon, *incoming.from_daemon]
    for name, packets in (("from-guest", said), ("to-guest", told)):
        for number, (packet, fds) in enumerate(packets):
            if packet:
                (directory / name / f"{number:02}").write_bytes(bytes([fds]) + packet)


def _keep_control(directory: Path, pair: DaemonPair) -> None:
    ask = pair.source.client.ask
    asked = [
        commands.Status(), commands.Attach(target="recorded"), commands.Events(), commands.Past(),
        commands.Cancel(target="nobody"), commands.SetBandwidth(bytes_s=10**9),
    ]  # fmt: skip
    for number, request in enumerate(asked):
        (directory / "requests" / f"{number}").write_bytes(ENCODER.encode(request) + b"\n")
        replies = b"".join(ENCODER.encode(reply) + b"\n" for reply in ask(request))
        replies = replies.replace(
            bytes(pair.source.directory), b"/run/migd"
        )  # no path of this machine is kept
        (directory / "answers" / f"{number}").write_bytes(replies)
    options = commands.Migrate(
        guest="recorded", to=pair.address, streams=2, downtime_limit_ms=1.5, verify="late", dirty_log="auto",
        compression="lz4", max_iterations=3, max_total_s=2.0, on_exhausted="force",
        max_bandwidth_bytes_s=10**8,
    )  # fmt: skip
    (directory / "requests" / "migrate").write_bytes(ENCODER.encode(options) + b"\n")
    for daemon in (pair.source, pair.destination):
        for path in (daemon.directory / "journal").rglob("*.jsonl"):
            (directory / "journal" / daemon.role).write_bytes(path.read_bytes())
        (directory / "history" / daemon.role).write_bytes((daemon.directory / "history.jsonl").read_bytes())
    for path in (ROOT / "configs").iterdir():
        (directory / "config" / path.stem).write_bytes(path.read_bytes())


def _record_questions(directory: Path) -> None:
    question = handshake.probe("0f" * 16)
    (directory / "probe" / "probe").write_bytes(FrameEncoder().message(question))
    (directory / "probe" / "about").write_bytes(
        FrameEncoder().message(handshake.about(question, 1, 1 << 30, 8))
    )


if __name__ == "__main__":
    record(SEEDS)
