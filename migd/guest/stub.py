"""The stub guest process: one single-threaded loop over its workload and its two sockets.

Between two slices of about a millisecond every point is a safe point, so PAUSE and hint requests are answered
within a few milliseconds. The process outlives its daemon: at the end of the control connection it goes on
as it is (running or paused) and hands its RAM back to the daemon that comes next.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time

import msgspec

from migd.errors import ConfigError, GuestError
from migd.guest import control
from migd.guest.content import FileContent
from migd.guest.control import GuestState
from migd.guest.guest import Guest, prepare_arming
from migd.guest.hint_answers import HintAnswers
from migd.guest.image import RamImage
from migd.guest.options import GuestOptions
from migd.guest.workload import WorkloadPlan

CONNECT_S = 5.0
"""For the first connection, when the daemon may be busy with others."""
RETRY_S = 0.2
ORPHAN_S = 60.0
"""An incoming guest that never started exits when no daemon has come back for it in this time."""

EXIT_DECLINED = 3
EXIT_ORPHAN = 1
_STDOUT = 1
_EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


def run_guest(options: GuestOptions) -> int:
    """Be that guest until it is told to quit, or killed: the exit code.

    0 quit or SIGTERM, 1 orphaned before it started, 3 declined by the daemon, 130 SIGINT. ConfigError names
    a wrong option or an absent daemon; GuestError means that the daemon broke off before it gave RAM.
    """
    plan = options.plan()
    content = None if options.incoming else FileContent(plan.fill)
    process = GuestProcess(options, plan, content)
    try:
        if options.image:
            process.serve(RamImage(options.image, options.free))
        elif not options.incoming:
            prepare_arming()
        return process.run()
    finally:
        process.close()


class GuestProcess:
    """The loop, and what it waits for: the control socket, the hint socket, a signal, the next operation."""

    def __init__(self, options: GuestOptions, plan: WorkloadPlan, content: FileContent | None) -> None:
        """``content`` for a new guest; an incoming one opens its own when it is loaded."""
        self._options = options
        self._plan = plan
        self._content = content
        state = GuestState.INCOMING if options.incoming else GuestState.RUNNING
        self._guest = Guest(state, options.incoming)
        self._selector = selectors.DefaultSelector()
        self._signals = _SignalPipe()
        self._selector.register(self._signals.reader, selectors.EVENT_READ, self._on_signal)
        self._control: socket.socket | None = None
        self._hint_socket: socket.socket | None = None
        """Before there is a machine to answer from."""
        self._hints: HintAnswers | None = None
        self._hint_events = 0
        self._retry_at = 0.0
        self._lost_at = 0.0
        self._has_attached = False
        """Once at least: from then on it has something to lose, and looks for the next daemon."""
        self._announced = False
        self._report: control.Checked | None = None
        """What its last self-check found."""
        self._next_word_at = time.monotonic() + 1.0
        self._declined = False
        self._exit_code: int | None = None

    def serve(self, image: RamImage) -> None:
        """Be the guest of an image, which is ours if this succeeds."""
        assert self._content is not None
        self._guest.serve(image, self._content, self._plan)

    def run(self) -> int:
        """See ``run_guest``."""
        try:
            self._connect(CONNECT_S)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"--socket {self._options.daemon}: {reason}; is `migd source` running?"
            ) from error
        while self._exit_code is None:
            for key, _ in self._selector.select(self._wait_s()):
                key.data()
            self._work()
        self._report_exit()
        return self._exit_code

    def close(self) -> None:
        """Let go of everything, in the order that it depends on each other."""
        self._drop_hints()
        if self._control is not None:
            self._control.close()
        self._guest.close()
        self._signals.close()
        self._selector.close()

    # -- the loop -----------------------------------------------------------------------------------

    def _wait_s(self) -> float | None:
        now = time.monotonic()
        waits = [self._guest.wait_s(now)]
        if self._control is None:
            waits.append(max(0.0, self._retry_at - now))
        return min((wait for wait in waits if wait is not None), default=None)

    def _work(self) -> None:
        if self._control is None:
            self._reconnect(time.monotonic())
        report = self._guest.work()
        if report is not None:
            self._say(f"checked: {report.pages} pages, {report.wrong} wrong")
            self._report = report
            self._send(report)
            prepare_arming()
        if not self._announced and not self._options.incoming:
            self._watch_filling()
        self._watch_hints()

    def _watch_filling(self) -> None:
        """A line a second until the guest is ready, then one that says so."""
        if not self._has_attached:
            return
        if self._guest.ready:
            self._announced = True
            self._announce()
        elif time.monotonic() >= self._next_word_at:
            self._next_word_at = time.monotonic() + 1.0
            doing = "reading" if self._options.image else "filling"
            self._say(f"{doing}: {self._guest.filled:.0%}")

    def _on_signal(self) -> None:
        self._exit_code = _EXIT_CODES[self._signals.read()]

    def _say(self, line: str) -> None:
        """One line on stdout, whose reader may be gone: a daemon that spawned us and died."""
        with contextlib.suppress(OSError):
            os.write(_STDOUT, f"guest {self._options.name} {line}\n".encode())

    def _announce(self) -> None:
        machine = self._guest.machine
        if machine is not None:
            self._say(
                f"ready: {machine.pages} pages, {machine.allocator.owned_pages} owned, "
                f"{self._plan.kind}, free pages hold {self._options.contract}"
            )

    def _report_exit(self) -> None:
        machine, workload = self._guest.machine, self._guest.workload
        if machine is not None and workload is not None:
            self._say(
                f"exit: {workload.progress.operations} operations, {machine.written_pages} pages written, "
                f"{machine.wrong_pages} wrong"
            )

    # -- the connection to the daemon ---------------------------------------------------------------

    def _connect(self, timeout_s: float) -> None:
        """Connect and say who we are; the answer comes through the loop. OSError if there is no daemon."""
        sock = control.new_socket()
        try:
            sock.settimeout(timeout_s)
            sock.connect(self._options.daemon)
            sock.setblocking(False)
            control.send(sock, self._introduction(), self._ram_fds())
        except OSError:
            sock.close()
            raise
        self._control = sock
        self._selector.register(sock, selectors.EVENT_READ, self._on_control)

    def _introduction(self) -> control.Attach:
        ram = self._guest.ram
        return control.Attach(
            version=control.VERSION,
            name=self._options.name,
            pid=os.getpid(),
            state=self._guest.state,
            blocks=self._options.blocks if ram is None else ram.blocks,
            migration=self._guest.migration,
            read_only=ram is not None and ram.read_only,
        )

    def _ram_fds(self) -> list[int]:
        return [] if self._guest.ram is None else list(self._guest.ram.fds)

    def _reconnect(self, now: float) -> None:
        if self._guest.state is GuestState.INCOMING and now - self._lost_at > ORPHAN_S:
            sys.stderr.write(f"guest {self._options.name}: no daemon for {ORPHAN_S:.0f} s, never started\n")
            self._exit_code = EXIT_ORPHAN
        elif now >= self._retry_at:
            self._retry_at = now + RETRY_S
            try:
                self._connect(0.0)
            except OSError:  # no daemon yet
                return

    def _disconnect(self) -> None:
        """The daemon is gone: nobody harvests, nobody takes hints; the guest goes on as it is."""
        if not self._has_attached:
            raise GuestError(f"the daemon at {self._options.daemon} broke off before it attached the guest")
        if self._control is not None:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None
        self._drop_hints()
        self._guest.disarm()
        now = time.monotonic()
        self._retry_at = now + RETRY_S
        if self._lost_at == 0.0:
            self._lost_at = now

    def _send(self, message: control.FromGuest, fds: list[int] | None = None) -> None:
        """To the daemon, if there is one; one that does not read its socket is as good as gone."""
        if self._control is None:
            return
        try:
            control.send(self._control, message, fds)
        except OSError:
            self._disconnect()

    def _on_control(self) -> None:
        if self._control is None:
            return
        try:
            packet = control.receive_from_daemon(self._control)
        except BlockingIOError:
            return
        except (OSError, GuestError):
            packet = None
        if packet is None:
            self._disconnect()
            return
        message, fds = packet
        try:
            self._obey(message, fds)
        except (GuestError, OSError) as error:  # OSError: no memory or descriptor left, or a false one
            self._send(control.Failed(id=message.id, reason=str(error)))
            if not self._has_attached:  # what the daemon passed is no RAM: nothing to go on with
                raise
        finally:
            control.close_all(fds)

    # -- what the daemon asks -----------------------------------------------------------------------

    def _obey(self, message: control.ToGuest, fds: list[int]) -> None:
        """Do it and answer. GuestError if it cannot be done; descriptors left in ``fds`` are closed."""
        match message:
            case control.Attached():
                self._attached(message, fds)
            case control.Declined(reason=reason):
                self._refused(reason)
            case control.Arm():
                addresses, pagemap_fd = self._guest.arm()
                self._send(control.Armed(id=message.id, addresses=tuple(addresses)), [pagemap_fd])
            case control.Disarm():
                self._guest.disarm()
                self._send(control.Done(id=message.id))
            case control.Pause(migration=migration):
                self._paused(message.id, *self._guest.pause(migration))
            case control.Resume():
                self._send(msgspec.structs.replace(self._guest.resume(), id=message.id))
            case control.Load():
                self._load(fds)
                self._send(control.Done(id=message.id))
            case control.Start():
                self._send(msgspec.structs.replace(self._guest.start(), id=message.id))
            case control.Quit():
                self._exit_code = 0

    def _attached(self, message: control.Attached, fds: list[int]) -> None:
        if self._guest.ram is None:
            self._adopt(message, fds)
        self._has_attached = True
        self._lost_at = 0.0
        self._declined = False
        self._drop_hints()
        if fds:
            self._hint_socket = socket.socket(fileno=fds[0])
            fds.pop(0)
        self._open_hints()
        if self._report is not None:  # a daemon that came back may have missed it
            self._send(self._report)

    def _adopt(self, message: control.Attached, fds: list[int]) -> None:
        """RAM comes with the first answer. A daemon that does not bring it cannot have this guest."""
        count = len(message.blocks)
        if not count or len(fds) < count:
            raise GuestError(f"the daemon gave {count} RAM blocks and {len(fds)} descriptors")
        if not self._options.incoming and message.blocks != self._options.blocks:
            raise GuestError(f"the daemon gave RAM of {_sizes(message)} pages, not what was asked for")
        self._guest.adopt_ram(message.blocks, fds[:count])
        del fds[:count]
        if self._content is not None:
            self._guest.begin(self._content, self._plan)

    def _refused(self, reason: str) -> None:
        """A new guest ends here; one with RAM has something to lose, and tries again."""
        if not self._declined:
            sys.stderr.write(f"guest {self._options.name}: the daemon declined: {reason}\n")
        if self._has_attached:
            self._declined = True
            self._disconnect()
        else:
            self._exit_code = EXIT_DECLINED

    def _paused(self, request: int, state: bytes, free_bits: bytes) -> None:
        fds: list[int] = []
        try:
            fds.append(control.blob_fd(state))
            fds.append(control.blob_fd(free_bits))
            self._send(control.Paused(id=request), fds)
        finally:
            control.close_all(fds)

    def _load(self, fds: list[int]) -> None:
        if not fds:
            raise GuestError("LOAD without a device state")
        self._guest.load(control.blob_bytes(fds[0]))
        self._open_hints()

    # -- hints --------------------------------------------------------------------------------------

    def _open_hints(self) -> None:
        """Answer on the hint socket, from the machine there is now."""
        machine = self._guest.machine
        if self._hints is not None:
            self._selector.unregister(self._hints.socket)
            self._hint_socket, self._hints = self._hints.socket, None
        if machine is not None and self._hint_socket is not None:
            self._hints = HintAnswers(self._hint_socket, machine)
            self._hint_socket = None
            self._hint_events = selectors.EVENT_READ
            self._selector.register(self._hints.socket, self._hint_events, self._on_hints)

    def _on_hints(self) -> None:
        if self._hints is None:
            return
        try:
            self._hints.receive()
            self._hints.send()
        except OSError:
            self._drop_hints()

    def _watch_hints(self) -> None:
        """Wait for room in the socket only while there is something to put into it."""
        if self._hints is None:
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._hints.wants_to_send else 0)
        if events != self._hint_events:
            self._selector.modify(self._hints.socket, events, self._on_hints)
            self._hint_events = events

    def _drop_hints(self) -> None:
        if self._hints is not None:
            self._selector.unregister(self._hints.socket)
            self._hints.close()
            self._hints = None
        if self._hint_socket is not None:
            self._hint_socket.close()
            self._hint_socket = None


def _sizes(message: control.Attached) -> str:
    return " + ".join(str(block.pages) for block in message.blocks)


class _SignalPipe:
    """SIGTERM and SIGINT as bytes on a socket, so that they end the loop between two slices."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous = {number: signal.signal(number, _ignore) for number in _EXIT_CODES}
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def read(self) -> signal.Signals:
        """The signal that came."""
        return signal.Signals(self.reader.recv(1)[0])

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.reader.close()
        self._writer.close()


def _ignore(_number: int, _frame: object) -> None:
    """The wake-up descriptor tells the loop."""
