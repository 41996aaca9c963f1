"""`migd agent`: the program that tells free pages from within a Linux guest, and how it gets there."""

from __future__ import annotations

import shlex
from importlib import resources
from importlib.resources.abc import Traversable

import click

TARGET = "/usr/local/lib/migd/agent.py"
"""Where the agent lies in a guest."""
UNIT_NAME = "migd-agent.service"
UNIT_TARGET = f"/etc/systemd/system/{UNIT_NAME}"

UNIT = f"""\
[Unit]
Description=Tells the host which memory pages are free, so that a migration does not send them
# The agent waits for its port, org.migd.hints.0, as long as it takes, and costs nothing meanwhile.
ConditionVirtualization=vm
ConditionPathExists=/proc/kpageflags

[Service]
Type=simple
ExecStart=/usr/bin/python3 -I -S {TARGET}
Restart=always
RestartSec=2
# An answer must not wait for the guest's work, and a guest without memory needs its agent most.
Nice=-20
OOMScoreAdjust=-900

# It reads /proc/iomem (CAP_SYS_ADMIN shows the addresses), /proc/kpageflags, /dev/kmsg (CAP_SYSLOG) and the
# kernel's configuration, and writes to its port. Nothing else is left to it.
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYSLOG CAP_SYS_NICE
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
# Makes /proc/sys read-only: the option --drop-caches needs "no".
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0077

[Install]
WantedBy=multi-user.target
"""

INSTALL = """\
# The guest needs Linux on QEMU, root, Python 3.6 or later, and a port that QEMU gives it:
#   -device virtio-serial-pci -chardev socket,id=hint,path=PATH,server=on,wait=off
#   -device virtserialport,chardev=hint,name=org.migd.hints.0
#
# 1. Copy the agent, into a guest that runs (VM: its name for ssh):

ssh root@VM mkdir -p {directory}
scp {source} root@VM:{target}

#    or into the image of one that does not:

virt-customize -a IMAGE --mkdir {directory} --copy-in {source}:{directory}

# 2. In the guest, see what it would tell, and what its free pages may hold:

python3 {target} --info

# 3. In the guest, let systemd run it. (If Python is elsewhere, change ExecStart: RHEL 8 has it as
#    /usr/libexec/platform-python.) The unit alone, from the host:
#    migd agent --unit | ssh root@VM 'cat > {unit_target}'

cat > {unit_target} <<'END_OF_UNIT'
{unit}END_OF_UNIT
systemctl daemon-reload
systemctl enable --now {unit_name}

# 4. What it does: journalctl -u {unit_name}
"""


@click.command()
@click.option("--install", "what", flag_value="install", help="What to copy where, and the systemd unit.")
@click.option("--unit", "what", flag_value="unit", help="The systemd unit alone.")
@click.option("--print", "what", flag_value="print", help="The agent itself: one Python file.")
@click.pass_context
def agent(context: click.Context, what: str | None) -> None:
    """Put into a Linux guest under QEMU the agent that tells which of its pages are free.

    The agent is one Python file without dependencies. It runs as root in the guest, waits on the
    virtio-serial port org.migd.hints.0, and answers while the guest is being migrated: a page that it
    reports is not sent unless it is written meanwhile. A guest without it is migrated as well, with all
    of its pages. Everything goes to stdout:

    \b
    migd agent --install                        says how it is installed
    migd agent --print | ssh root@VM python3 - --info
                                                shows what it would tell
    """
    if what == "install":
        click.echo(_installation(), nl=False)
    elif what == "unit":
        click.echo(UNIT, nl=False)
    elif what == "print":
        click.echo(_source().read_text(encoding="utf-8"), nl=False)
    else:
        click.echo(context.get_help())


def _source() -> Traversable:
    """The agent as this installation has it. It is read, not imported."""
    return resources.files("migd.guest") / "agent.py"


def _installation() -> str:
    return INSTALL.format(
        source=shlex.quote(str(_source())),
        directory=TARGET.rpartition("/")[0],
        target=TARGET,
        unit=UNIT,
        unit_target=UNIT_TARGET,
        unit_name=UNIT_NAME,
    )
