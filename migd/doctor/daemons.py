"""The daemons that run here: their versions, and the port that a destination listens on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from migd import __version__
from migd.config import DestinationConfig
from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import StatusReport
from migd.doctor.finding import Finding, fail, ok, warn
from migd.errors import ConfigError, MigdError, ResourceError
from migd.limits import Limits
from migd.transport.tcp import Listener, is_loopback, parse_address


def statuses(directories: Sequence[Path]) -> tuple[list[StatusReport], list[Finding]]:
    """What the daemons of these directories say of themselves, and a finding for each that is there."""
    reports, findings = [], []
    for directory in directories:
        try:
            report = ControlClient(directory).ask_once(commands.Status())
        except ConfigError:  # none is there
            continue
        except MigdError as error:
            findings.append(
                fail(
                    f"daemon in {directory}",
                    str(error),
                    "commands of this version cannot steer it",
                    "restart it with the version that is installed, or look into its log if that is the same",
                )
            )
            continue
        assert isinstance(report, StatusReport)
        reports.append(report)
        findings.append(_version(report))
    return reports, findings or [ok("daemons", "none runs here")]


def _version(report: StatusReport) -> Finding:
    check = f"daemon in {report.runtime_dir}"
    found = f"migd {report.role} {report.version}, pid {report.pid}, {len(report.guests)} guests"
    if report.version == __version__:
        return ok(check, found)
    return warn(
        check,
        f"{found}; this command is {__version__}",
        "what one of the two has learnt the other may not understand",
        "restart the daemon with the version that is installed: guests outlive that and attach again",
    )


def listening(config: DestinationConfig, reports: Sequence[StatusReport]) -> Iterator[Finding]:
    """The port that ``destination.listen`` names, and who can reach it."""
    yield port(config.listen, reports)
    if is_loopback(config.listen):
        yield ok("who can reach it", "this host alone", "set destination.listen for guests of other hosts")
    elif config.insecure_plaintext:
        yield warn(
            "who can reach it",
            f"whoever reaches {config.listen}, as insecure_plaintext = true",
            "guest memory can be read on its way, and anybody may send guests here",
            "leave it so in a private network only",
        )
    else:
        yield fail(
            "who can reach it",
            f"{config.listen} can be reached from other hosts, in plaintext",
            "a destination refuses to start",
            "listen on loopback, or set destination.insecure_plaintext = true in a private network",
        )


def port(listen: str, reports: Sequence[StatusReport]) -> Finding:
    """Free, taken by a daemon that was asked, or by somebody else: found out by listening on it."""
    check = f"port of {listen}"
    if parse_address(listen)[1] == 0:
        return ok(check, "whichever is free")
    for report in reports:
        if report.listen == listen:
            return ok(check, f"migd {report.role}, pid {report.pid}, listens there")
    try:
        Listener(listen, _nobody, Limits()).close()
    except ResourceError as error:
        remedy = "choose another destination.listen, or end what listens there"
        return fail(check, str(error), "no destination can be started with this configuration", remedy)
    return ok(check, "free")


async def _nobody(_link: object, _frame: object) -> None:
    """The listener is closed before anything is served."""
