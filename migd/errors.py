"""The one error tree: the class says whose fault it is, and the exit code what became of the guest.

::

    MigdError                     1   the migration failed; the guest runs on the source
     +-- ConfigError              2   bad configuration, option or usage: nothing was started
     +-- GuestError               1   the guest is silent, dead or lies
     |    +-- LiveUnsupported     3   no write tracking: only a paused migration is possible
     +-- PeerError                1   the other daemon
     |    +-- PeerLost            1   connection lost or silent for too long
     |    +-- ProtocolError       1   bytes that break the protocol: wrong length, digest, order
     |    +-- Refused             3   the peer said no, and why
     +-- ResourceError            3   this host lacks memory, a descriptor, a port, disk for the journal
     +-- VerificationError        5   the memory at the destination is not the memory at the source
     +-- LedgerError              70  our own bug: an accounting rule would be broken; the attempt is void
     +-- Cancelled                130 the operator cancelled; the guest runs on the source
     +-- OutcomeUnknown           4   GO was sent and no answer came: the guest stays paused until resolved

``migd`` prints ``str(error)`` as one line and exits with ``exit_code``.
"""

from __future__ import annotations


class MigdError(Exception):
    """Base of every error that migd raises on purpose."""

    exit_code = 1


class ConfigError(MigdError):
    """A configuration file, option or argument is wrong; the message names file, key and remedy."""

    exit_code = 2


class GuestError(MigdError):
    """The guest did not answer in time, died, or broke its protocol."""


class LiveUnsupported(GuestError):
    """Writes cannot be tracked here, so only ``--paused`` is safe."""

    exit_code = 3


class PeerError(MigdError):
    """The daemon at the other end failed us."""


class PeerLost(PeerError):
    """The connection ended, was reset, or went silent beyond its limit."""


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


def first_cause(error: BaseException) -> BaseException:
    """The error that ended a task group: the first one in it that is not a group itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
