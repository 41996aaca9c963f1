"""What lies in files or came as a whole: journals, history, device state, configuration, free bitmap."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from random import Random

import msgspec

from migd import config
from migd.daemon.history import History
from migd.errors import ConfigError, GuestError
from migd.guest import device_state
from migd.guest.control import Block, GuestState
from migd.guest.guest import Guest
from migd.guest.image import RamImage
from migd.guest.machine import page_digest
from migd.migration.decision import go_at_destination, incoming_at_destination, paused_at_source
from migd.migration.journal import CorruptJournal, Journal
from migd.ram.block import BlockShape, RamBlock
from tests.fuzz import mutation, texts
from tests.fuzz.seeds import recorded
from tests.fuzz.target import ACCEPTED, Broken, Outcome, flipped_bits, survives

PAGES = 256
"""Of the guest that was recorded."""
_LENGTH_AT, _HEADER_AT = 24, 28
_RANDOM_MASK = (1 << 64) - 1


class _InFiles:
    """Inputs go through a file in memory."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="migd-fuzz-"))

    def close(self) -> None:
        shutil.rmtree(self._directory)


class Journals(_InFiles):
    """Records, or an error that says so: never a decision from a line that is not what was written."""

    name = "journal"
    shared = 60

    def __init__(self) -> None:
        super().__init__()
        self.seeds = recorded("journal")
        self._journal = Journal(self._directory)
        self._migration = msgspec.json.decode(self.seeds[0].splitlines()[0])["migration"]
        self._path = self._directory / f"{self._migration}.jsonl"

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return texts.json_mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        self._path.write_bytes(data)
        try:
            records = self._journal.records(self._migration)
        except CorruptJournal as error:
            return Outcome(type(error).__name__, 0)
        for record in records:
            if record.migration != self._migration:
                raise Broken("a record of another migration was read")
            survives(record)
        last = records[-1].mark if records else None
        for decide in (paused_at_source, incoming_at_destination, go_at_destination):
            decide(last)
        return Outcome(ACCEPTED, len(records))


class Histories(_InFiles):
    """A line that cannot be read is left out, and nothing else happens."""

    name = "history"
    shared = 30

    def __init__(self) -> None:
        super().__init__()
        self.seeds = recorded("history")
        self._path = self._directory / "history.jsonl"
        self._history = History(self._path)

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return texts.json_mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        self._path.write_bytes(data)
        found = self._history.newest(1000)
        for entry in found:
            survives(entry)
        return Outcome(ACCEPTED if found else "left out", len(found))


class DeviceStates:
    """A state is refused, or becomes a guest that says the same of itself; a flipped bit is refused."""

    name = "device-state"
    shared = 40

    def __init__(self, guest: type[Guest] = Guest) -> None:
        self.seeds = recorded("device-state")
        self._guest = guest
        self._ram = RamBlock.create(BlockShape("ram", PAGES))

    def mutate(self, data: bytes, chance: Random) -> bytes:
        if chance.random() < 0.2 or len(data) < _HEADER_AT:
            return mutation.mangled(data, self.seeds[0], chance)
        size = int.from_bytes(data[_LENGTH_AT:_HEADER_AT], "little")
        header, body = data[_HEADER_AT : _HEADER_AT + size], data[_HEADER_AT + size :]
        if chance.random() < 0.7:
            header = texts.json_mutated(header, b"", chance)
        else:
            body = mutation.mangled(body, body, chance)
        length = len(header) if chance.random() < 0.9 else mutation.number(chance, 32)
        behind = length.to_bytes(4, "little") + header + body
        return data[:8] + page_digest(behind) + behind

    def run(self, data: bytes) -> Outcome:
        guest = self._guest(GuestState.INCOMING, "0" * 32)
        try:
            guest.adopt_ram([Block("ram", PAGES)], [os.dup(self._ram.fd)])
            try:
                guest.load(data)
            except GuestError as error:
                return Outcome(type(error).__name__, 0)
            if any(flipped_bits(data, seed) for seed in self.seeds):
                raise Broken("a flipped bit went unnoticed")
            guest.start()
            saved, _ = guest.pause("0" * 32)
            if _header(saved) != _header(data):
                raise Broken("the guest that arrived is not the one that was saved")
            return Outcome(ACCEPTED, 1)
        finally:
            guest.close()

    def close(self) -> None:
        self._ram.close()


def _header(data: bytes) -> msgspec.Struct:
    """All that a device state says but when the guest was stopped; of its random state what is used."""
    header = device_state.parse(data).header
    progress = msgspec.structs.replace(header.progress, random=header.progress.random & _RANDOM_MASK)
    return msgspec.structs.replace(header, stopped_at_ns=0, progress=progress)


class Configurations(_InFiles):
    """A configuration, or ConfigError with one line about it."""

    name = "config"
    shared = 8

    def __init__(self) -> None:
        super().__init__()
        self.seeds = recorded("config")
        self._path = self._directory / "config.toml"

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return texts.toml_mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        self._path.write_bytes(data)
        try:
            found = config.load(self._path)
            config.runtime_dir(found, "serve")
        except ConfigError as error:
            return Outcome(type(error).__name__, 0)
        if msgspec.convert(msgspec.to_builtins(found), config.Config) != found:
            raise Broken("a configuration does not survive being shown")  # not as JSON, which has no inf
        return Outcome(ACCEPTED, 1)


class FreeBitmaps(_InFiles):
    """The free pages of an image: exactly one bit a page, or ConfigError."""

    name = "free-bitmap"
    shared = 30

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [*recorded("free-bitmap"), b"\xff\x07", b"\x01"]
        self._images = []
        for pages in (PAGES, 11, 1):
            path = self._directory / f"image-{pages}"
            with path.open("wb") as image:
                image.truncate(pages * 4096)
            self._images.append((pages, str(path)))
        self._free = self._directory / "free"

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return mutation.mangled(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        self._free.write_bytes(data)
        accepted = 0
        for pages, path in self._images:
            try:
                image = RamImage(path, str(self._free))
            except ConfigError:
                continue
            image.close()
            accepted += 1
            if len(data) != -(-pages // 8) or int.from_bytes(data, "little") >> pages:
                raise Broken(f"{len(data)} bytes are taken for the free pages of {pages}")
        return Outcome(ACCEPTED if accepted else "ConfigError", accepted)
