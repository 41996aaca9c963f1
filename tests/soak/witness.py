"""Witness: the soak's end of its line to every process that is a guest; it holds their RAM and journals.

A guest that was moved waits for it before its first instruction: at that moment the witness has both copies
in its hands, and lets the oracle look.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from tests.soak import words
from tests.soak.journal import Journal, Running
from tests.soak.oracle import Comparison, Ram, compare, inspect
from tests.soak.words import Behaviour, Here

WAIT_S = 30.0


class Copy:
    """One process that is, was or may become a guest; its descriptors are ours until ``close``."""

    def __init__(self, here: Here, sock: socket.socket, fds: list[int]) -> None:
        self.name = here.name
        self.pid = here.pid
        self.migration = here.migration
        self._sock = sock
        self._fds = fds
        self.journal = Journal(fds[0], sum(here.block_pages), writable=False)
        self.ram = Ram(fds[1:], here.block_pages)
        self.answers = threading.Condition()
        self.answered: words.FromGuest | None = None
        self.gone = False
        self.steps_at_pause = 0

    def tell(self, word: words.ToGuest) -> None:
        """A guest that is gone hears nothing."""
        with contextlib.suppress(OSError):
            words.send(self._sock, word)

    def ask(self, word: words.ToGuest) -> None:
        """Tell, and wait for its answer. AssertionError if none comes."""
        with self.answers:
            self.answered = None
            self.tell(word)
            came = self.answers.wait_for(lambda: self.answered is not None or self.gone, WAIT_S)
            assert came, f"guest {self.name} (pid {self.pid}) did not answer {word}"

    def close(self) -> None:
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Witness:
    """Listens at ``path`` in a thread of its own. One guest at a time, in any number of copies."""

    def __init__(
        self,
        path: Path,
        guest: int,
        *,
        zeroed: bool,
        stopped: Callable[[], None],
        starting: Callable[[], None],
    ) -> None:
        """``stopped`` is called at every pause, ``starting`` before a guest runs at its destination."""
        self._guest = guest
        self._zeroed = zeroed
        self._stopped = stopped
        self._starting = starting
        self._listener = words.new_socket()
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, "stop")
        self._changed = threading.Condition()
        self.copies: dict[socket.socket, Copy] = {}
        self._comparisons: list[Comparison] = []
        self.problems: list[str] = []
        """What no guest of a right daemon ever does."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # -- what a run asks ----------------------------------------------------------------------------

    def running(self) -> Copy:
        """The one copy that runs. AssertionError if it is none, or two."""
        with self._changed:
            found = [copy for copy in self.copies.values() if copy.journal.state is Running.YES]
        assert len(found) == 1, f"{len(found)} copies of the guest run: pids {[copy.pid for copy in found]}"
        return found[0]

    def behave(self, behaviour: Behaviour) -> None:
        self.running().ask(words.Behave(behaviour))

    def appeared(self) -> bool:
        """The guest has filled its RAM."""
        with self._changed:
            return any(copy.journal.state is Running.YES for copy in self.copies.values())

    def take(self) -> list[Comparison]:
        """What was compared since the last time."""
        with self._changed:
            taken, self._comparisons = self._comparisons, []
        return taken

    def halt(self) -> Comparison:
        """Stop the guest for good, and look at what it owns."""
        copy = self.running()
        copy.ask(words.Halt())
        return inspect(self._guest, copy.journal, copy.ram)

    def close(self) -> None:
        """Every copy ends with its line to us."""
        self._waker.close()
        self._thread.join(WAIT_S)

    # -- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data == "stop":
                    self._end()
                    return
                if key.fileobj is self._listener:
                    sock, _ = self._listener.accept()
                    self._selector.register(sock, selectors.EVENT_READ)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._hear(key.fileobj)

    def _end(self) -> None:
        for copy in self.copies.values():
            copy.close()
        self._listener.close()
        self._woken.close()
        self._selector.close()

    def _hear(self, sock: socket.socket) -> None:
        packet = words.receive(sock)
        if packet is None:
            self._lose(sock)
            return
        word, fds = packet
        match word:
            case Here():
                with self._changed:
                    self.copies[sock] = Copy(word, sock, fds)
            case words.Stopped():
                self.copies[sock].steps_at_pause = self.copies[sock].journal.steps
                self._stopped()
            case words.Starting():
                self._starting()
                self._compare(self.copies[sock])
            case words.Behaving() | words.Halted():
                self._answered(self.copies[sock], word)

    def _answered(self, copy: Copy, word: words.FromGuest) -> None:
        with copy.answers:
            copy.answered = word
            copy.answers.notify_all()

    def _lose(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        with self._changed:
            copy = self.copies.pop(sock, None)
        if copy is None:
            sock.close()
            return
        if copy.journal.state is Running.PAUSED and copy.journal.steps != copy.steps_at_pause:
            self.problems.append(f"the copy of pid {copy.pid} went on after its last pause")
        with copy.answers:
            copy.gone = True
            copy.answers.notify_all()
        copy.close()

    def _compare(self, arrived: Copy) -> None:
        """G2 first: whoever else there is, is paused. Then every byte."""
        others = [copy for copy in self.copies.values() if copy is not arrived]
        for copy in others:
            if copy.journal.state is Running.YES:
                self.problems.append(f"{arrived.migration} is started while pid {copy.pid} runs")
        found = Comparison()
        source = next((copy for copy in others if _is_image_of(arrived, copy)), None)
        if source is None:
            self.problems.append(f"{arrived.migration}: its device state is that of no paused guest")
        elif not source.journal.exact:
            self.problems.append(f"pid {source.pid} was paused in the middle of a step")
        else:
            found = compare(self._guest, source.journal, source.ram, arrived.ram, zeroed=self._zeroed)
        if surprises := arrived.journal.surprises:
            self.problems.append(f"{surprises} pages were not zero when they were allocated")
        with self._changed:
            self._comparisons.append(found)
        arrived.tell(words.Compared(found.wrong_pages))


def _is_image_of(arrived: Copy, source: Copy) -> bool:
    """An older source that has not ended yet is paused, too; its journal is another."""
    return source.journal.state is Running.PAUSED and source.journal.content == arrived.journal.content
