"""The one error tree: the class says whose fault it is, and the exit code what became of the guest.

::

    MigdError                     1   the migration failed; the guest runs on the source
     +-- ConfigError              2   bad configuration, option or usage: nothing was started
     +-- GuestError               1   the guest is silent, dead or lies
     |    +-- LiveUnsupported     3   the dirty log that was asked for is not to be had here
     +-- PeerError                1   the other daemon
     |    +-- PeerLost            1   connection lost or silent for too long
     |    +-- PeerAborted         1   the peer gave up, and says why
     |    +-- ProtocolError       1   bytes that break the protocol: wrong length, digest, order
     |    +-- Refused             3   the peer said no, and why
     +-- ResourceError            3   this host lacks memory, a descriptor, a port, disk for the journal
     +-- VerificationError        5   the memory at the destination is not the memory at the source
     +-- LedgerError              70  our own bug: an accounting rule would be broken; the attempt is void
     +-- Cancelled                130 the operator cancelled; the guest runs on the source
     +-- OutcomeUnknown           4   GO was sent and no answer came: the guest stays paused until resolved
     +-- TimedOut                 124 a caller's own time for waiting is over: what it waited for goes on

``migd`` prints ``str(error)`` as one line and exits with ``exit_code``.
"""

from __future__ import annotations

EXIT_CODES = {
    0: "done",
    1: "failed; the guest runs on at the source, unless it is the guest itself that ended",
    2: "wrong usage or configuration; nothing was started",
    3: "refused or impossible here: no write tracking, no memory, a port in use, or the peer said no",
    4: "the outcome is unknown; a paused guest stays so until `migd resolve`, `migd status` says which",
    5: "verification failed: if it was late, the guest is paused at the destination and the source keeps "
    "its memory",
    70: "a bug in migd: an accounting rule would have been broken, and the attempt was given up",
    124: "whoever waited or watched has stopped; the migration goes on",
    130: "cancelled; the guest runs on at the source",
}
"""What each exit code of ``migd`` means, in a ``Result``, too; README and docs/api.md show them."""


class MigdError(Exception):
    """Base of every error that migd raises on purpose."""

    exit_code = 1


class ConfigError(MigdError):
    """A configuration file, option or argument is wrong; the message names file, key and remedy."""

    exit_code = 2


class GuestError(MigdError):
    """The guest did not answer in time, died, or broke its protocol."""


class LiveUnsupported(GuestError):
    """The kernel does not track writes here; only the compare log, or ``--paused``, is safe."""

    exit_code = 3


class PeerError(MigdError):
    """The daemon at the other end failed us."""


class PeerLost(PeerError):
    """The connection ended, was reset, or went silent beyond its limit."""


class PeerAborted(PeerError):
    """The peer was reached, and cannot do what it should; the message has its reason."""


class ProtocolError(PeerError):
    """The peer sent bytes the protocol does not allow; nothing from them was used."""


class Refused(PeerError):
    """The peer understood the request and declined it."""

    exit_code = 3


class ResourceError(MigdError):
    """This host lacks something the migration needs."""

    exit_code = 3


class VerificationError(MigdError):
    """What the destination holds is not what the source held (transport or tracking)."""

    exit_code = 5


class LedgerError(MigdError):
    """A caller tried to break a rule of the ledger, or its identity does not hold."""

    exit_code = 70


class Cancelled(MigdError):
    """The operator cancelled before GO."""

    exit_code = 130


class OutcomeUnknown(MigdError):
    """GO was sent and no answer came; only the destination, or an operator, may decide."""

    exit_code = 4


class TimedOut(MigdError):
    """Whoever waited for something has waited as long as they wanted to; it goes on."""

    exit_code = 124


def of_exit_code(exit_code: int, text: str) -> MigdError:
    """The error behind an exit code that another process gives, with its words.

    Several errors share 1 and 3: these are MigdError itself and Refused.
    """
    kinds: dict[int, type[MigdError]] = {
        2: ConfigError,
        3: Refused,
        4: OutcomeUnknown,
        5: VerificationError,
        70: LedgerError,
        124: TimedOut,
        130: Cancelled,
    }
    return kinds.get(exit_code, MigdError)(text)


def first_cause(error: BaseException) -> BaseException:
    """The error that ended a task group: the first one in it that is not a group itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
