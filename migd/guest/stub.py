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
from dataclasses import dataclass

import msgspec

from migd.errors import ConfigError, GuestError
from migd.guest import control
from migd.guest.content import PAGE_BYTES, PYTHON_INSTALLATION, FileContent
from migd.guest.control import Block, GuestState
from migd.guest.guest import Guest, prepare_arming
from migd.guest.hint_answers import HintAnswers
from migd.guest.workload import DEFAULT_RATES_BYTES_S, WorkloadKind, WorkloadPlan
from migd.ram.contract import FreeContract

CONNECT_S = 5.0
"""For the first connection, when the daemon may be busy with others."""
RETRY_S = 0.2
ORPHAN_S = 60.0
"""An incoming guest that never started exits when no daemon has come back for it in this time."""

EXIT_DECLINED = 3
EXIT_ORPHAN = 1
_STDOUT = 1
_EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}

_CONTRACTS = {contract.name.lower(): contract for contract in FreeContract}


@dataclass(frozen=True)
class GuestOptions:
    """What ``migd guest`` was asked for; checked by ``run_guest``."""

    daemon: str
    """Path of the daemon's guest socket."""
    name: str
    ram_bytes: int = 0
    """A multiple of 4096; an incoming guest learns it from its daemon."""
    workload: str = "churn"
    """idle, churn, hog or write-heavy."""
    rate_bytes_s: int | None = None
    """0: as fast as it goes; None: DEFAULT_RATES_BYTES_S."""
    live_fraction: float = 0.05
    fill: tuple[str, ...] = (PYTHON_INSTALLATION,)
    seed: int = 1
    contract: str = "anything"
    """What free pages hold when they are allocated again: anything, zero or none (nothing declared)."""
    incoming: str = ""
    """The migration this guest is spawned for, whose device state brings all but name and daemon."""


def run_guest(options: GuestOptions) -> int:
    """Be that guest until it is told to quit, or killed: the exit code.

    0 quit or SIGTERM, 1 orphaned before it started, 3 declined by the daemon, 130 SIGINT. ConfigError names
    a wrong option or an absent daemon; GuestError means that the daemon broke off before it gave RAM.
    """
    plan = _checked_plan(options)
    content = None
    if not options.incoming:
        content = FileContent(plan.fill)
        prepare_arming()
    process = GuestProcess(options, plan, content)
    try:
        return process.run()
    finally:
        process.close()


def _checked_plan(options: GuestOptions) -> WorkloadPlan:
    """The workload that the options describe. ConfigError naming the first wrong one."""
    if not options.name:
        raise ConfigError("--name: a guest needs a name")
    if not options.incoming and (options.ram_bytes <= 0 or options.ram_bytes % PAGE_BYTES):
        raise ConfigError(f"--ram: {options.ram_bytes} bytes is not a positive multiple of {PAGE_BYTES}")
    if options.workload not in tuple(WorkloadKind):
        raise ConfigError(f"--workload: {options.workload!r} is none of {', '.join(WorkloadKind)}")
    if options.contract not in _CONTRACTS:
        raise ConfigError(f"--contract: {options.contract!r} is none of {', '.join(_CONTRACTS)}")
    if not 0 < options.live_fraction <= 0.9:
        raise ConfigError(f"--live: {options.live_fraction} is not above 0 and at most 0.9")
    if options.rate_bytes_s is not None and options.rate_bytes_s < 0:
        raise ConfigError(f"--rate: {options.rate_bytes_s} bytes per second is negative")
    if not 0 <= options.seed < 1 << 64:
        raise ConfigError(f"--seed: {options.seed} is not between 0 and 2^64 - 1")
    kind = WorkloadKind(options.workload)
    rate = DEFAULT_RATES_BYTES_S[kind] if options.rate_bytes_s is None else options.rate_bytes_s
    return WorkloadPlan(
        kind=kind,
        rate_bytes_s=rate,
        live_fraction=options.live_fraction,
        seed=options.seed,
        contract=_CONTRACTS[options.contract],
        fill=tuple(os.path.abspath(path) for path in options.fill),
    )


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
        self._announced = False
        self._report: control.Checked | None = None
        """What its last self-check found."""
        self._next_word_at = time.monotonic() + 1.0
        self._declined = False
        self._exit_code: int | None = None

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
        workload = self._guest.workload
        if workload is None:
            return
        if workload.ready:
            self._announced = True
            self._announce()
        elif time.monotonic() >= self._next_word_at:
            self._next_word_at = time.monotonic() + 1.0
            self._say(f"filling: {workload.filled:.0%}")

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
                f"{self._options.workload}, free pages hold {self._options.contract}"
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
        blocks = self._guest.blocks
        if not blocks and not self._options.incoming:
            blocks = (Block("ram", self._options.ram_bytes // PAGE_BYTES),)
        return control.Attach(
            version=control.VERSION,
            name=self._options.name,
            pid=os.getpid(),
            state=self._guest.state,
            blocks=blocks,
            migration=self._guest.migration,
        )

    def _ram_fds(self) -> list[int]:
        return [self._guest.ram_fd] if self._guest.blocks else []

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
        if not self._guest.blocks:
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
            if not self._guest.blocks:  # what the daemon passed is no RAM: nothing to go on with
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
                address, pagemap_fd = self._guest.arm()
                self._send(control.Armed(id=message.id, addresses=(address,)), [pagemap_fd])
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
        if not self._guest.blocks:
            self._adopt(message, fds)
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
        if len(message.blocks) != 1 or not fds:
            raise GuestError(
                f"{len(message.blocks)} RAM blocks and {len(fds)} descriptors; a stub has 1 block"
            )
        block = message.blocks[0]
        if not self._options.incoming and block.pages * PAGE_BYTES != self._options.ram_bytes:
            raise GuestError(f"{block.pages} pages of RAM instead of {self._options.ram_bytes // PAGE_BYTES}")
        self._guest.adopt_ram(block, fds[0])
        fds.pop(0)
        if self._content is not None:
            self._guest.begin(self._content, self._plan)

    def _refused(self, reason: str) -> None:
        """A new guest ends here; one with RAM has something to lose, and tries again."""
        if not self._declined:
            sys.stderr.write(f"guest {self._options.name}: the daemon declined: {reason}\n")
        if self._guest.blocks:
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
