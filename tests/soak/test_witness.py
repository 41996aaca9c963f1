"""The witness, with guests that are nothing but a line to it and a journal: what it must not let pass."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak import words
from tests.soak.journal import Journal, Running, journal_file
from tests.soak.page import PAGE_BYTES
from tests.soak.witness import Witness
from tests.soak.words import Here
from tests.support.pair import WAIT_S, eventually

PAGES = 4


class Actor:
    """A process that says it is the guest."""

    def __init__(self, path: Path, pid: int) -> None:
        self.sock: socket.socket = words.new_socket()
        self.sock.settimeout(WAIT_S)
        self.sock.connect(str(path))
        journal_fd, ram_fd = journal_file(PAGES), os.memfd_create("ram")
        os.ftruncate(ram_fd, PAGES * PAGE_BYTES)
        self.journal = Journal(journal_fd, PAGES, writable=True)
        words.send(self.sock, Here("actor", pid, f"migration {pid}", (PAGES,)), (journal_fd, ram_fd))
        os.close(journal_fd)
        os.close(ram_fd)

    def stop(self) -> None:
        self.journal.state = Running.PAUSED
        words.send(self.sock, words.Stopped())

    def step(self) -> None:
        self.journal.begin_step()
        self.journal.end_step()

    def start(self) -> int:
        """How many pages were wrong."""
        words.send(self.sock, words.Starting())
        packet = words.receive(self.sock)
        assert packet is not None
        assert isinstance(packet[0], words.Compared)
        return packet[0].wrong_pages


class Stage:
    """A witness, and the actors before it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stops = 0
        self.witness = Witness(path, 1, zeroed=False, stopped=self._stopped, starting=lambda: None)
        self._actors: list[Actor] = []

    def _stopped(self) -> None:
        self.stops += 1

    def enter(self) -> Actor:
        pid = len(self._actors) + 1
        actor = Actor(self._path, pid)
        self._actors.append(actor)
        eventually(lambda: len(self.witness.copies) == len(self._actors), "the actor to be known")
        return actor

    def close(self) -> None:
        self.witness.close()
        for actor in self._actors:
            actor.sock.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "witness.sock")
    yield stage
    stage.close()


def test_one_that_starts_where_the_other_stopped(stage: Stage) -> None:
    source, arrived = stage.enter(), stage.enter()
    source.journal.state = Running.YES
    source.step()
    source.stop()
    arrived.journal.load(source.journal.save())
    assert arrived.start() == 0
    assert stage.witness.problems == []
    (found,) = stage.witness.take()
    assert found.free_pages == PAGES


def test_one_that_starts_while_the_other_runs(stage: Stage) -> None:
    source, arrived = stage.enter(), stage.enter()
    source.journal.state = Running.YES
    arrived.start()
    assert "is started while pid 1 runs" in stage.witness.problems[0]


def test_one_that_is_no_image_of_any_paused_guest(stage: Stage) -> None:
    source, arrived = stage.enter(), stage.enter()
    source.stop()
    source.step()
    arrived.start()
    assert stage.witness.problems == ["migration 2: its device state is that of no paused guest"]


def test_one_that_was_paused_in_the_middle_of_a_step(stage: Stage) -> None:
    source, arrived = stage.enter(), stage.enter()
    source.journal.begin_step()
    source.stop()
    arrived.journal.load(source.journal.save())
    arrived.start()
    assert stage.witness.problems == ["pid 1 was paused in the middle of a step"]


def test_a_source_that_goes_on_after_its_last_pause(stage: Stage) -> None:
    source = stage.enter()
    source.stop()
    eventually(lambda: stage.stops, "the pause to be known")
    source.step()
    source.sock.close()
    eventually(lambda: stage.witness.problems, "the witness to notice")
    assert stage.witness.problems == ["the copy of pid 1 went on after its last pause"]


def test_two_copies_that_run(stage: Stage) -> None:
    for actor in (stage.enter(), stage.enter()):
        actor.journal.state = Running.YES
    with pytest.raises(AssertionError, match="2 copies of the guest run"):
        stage.witness.running()
