"""Inventory: what a QEMU says of itself over QMP, and why it cannot be moved, if it cannot.

Every reason names what is wrong and what to change. Some rule out any migration; some only the kernel's write
tracking, and then comparing content is still right.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from migd.errors import Refused
from migd.qemu.monitor import CommandRefused, Monitor

HINT_PORT = "org.migd.hints.0"
"""Name of the virtio-serial port that the agent in the guest answers on."""

MEMO_PREFIX = "migd-memo-"
"""Of objects that migd keeps in QEMU (``migd.qemu.memo``)."""

_FILE, _MEMFD = "memory-backend-file", "memory-backend-memfd"

_SENDS_MEMFD = (8, 0)
"""From which version on a shared memfd is sent by QEMU itself: x-ignore-shared means named files only then.
Seen with 10.0.2, and not with 7.2; what lies between was not tried, and is taken for the newer."""

_ASSIGNED = ("vfio-", "vhost-", "vdpa", "ivshmem", "nvdimm", "virtio-mem", "virtio-pmem", "sgx-epc")
"""Device types whose memory is written behind QEMU's back, or is no plain RAM. vhost-net is a property of
virtio-net-pci, runs with QEMU's own mappings, and is not among them."""

_USE_FILE = (
    "-object memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/NAME,share=on -machine "
    "TYPE,memory-backend=ram"
)

_UNIX = re.compile(r"^(?:disconnected:)?unix:([^,].*),server(?:=on)?$")

_DMA_DRIVERS = (
    "nvme",
    "nvme-io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
)
"""Block drivers with which a device reads into guest memory by itself."""


@dataclass(frozen=True)
class Backend:
    """A memory backend; ``kind`` is its QOM type."""

    id: str
    kind: str
    bytes: int
    shared: bool
    path: str = ""


@dataclass(frozen=True)
class Inventory:
    """Everything that was asked for, at one moment."""

    version: tuple[int, ...]
    machine: str
    run_state: str
    backends: tuple[Backend, ...]
    devices: tuple[str, ...]
    """QOM types."""
    direct_drives: tuple[str, ...]
    """Files and devices behind its drives that are read past the page cache (cache=none)."""
    blocked: tuple[str, ...]
    """QEMU's own reasons against migration."""
    balloon_bytes: int
    """What the balloon leaves to the guest; 0 without one."""
    reports_free: bool
    """Its balloon gives free pages back to the host as it likes (free-page-reporting)."""
    hint_socket: str
    """Host end of the hint port; empty without one."""
    mtree: str
    memos: tuple[str, ...]
    """Ids of migd's own objects in QEMU."""

    @property
    def name(self) -> str:
        return "QEMU " + ".".join(map(str, self.version))

    def obstacles(self) -> list[str]:
        """Why it cannot be moved at all; empty if it can."""
        return [*self._ram_obstacles(), *self._device_obstacles()]

    def untracked(self) -> str:
        """Why the kernel's write tracking would miss something; empty if it would not."""
        if self.direct_drives:
            drives = ", ".join(self.direct_drives)
            return (
                f"{drives}: with cache=none devices write to guest memory past the kernel's write tracking "
                f"(set cache.direct=off, or cache=writeback)"
            )
        if self.reports_free:
            return "its balloon gives memory back unseen: start QEMU with free-page-reporting=off"
        return ""

    def _ram_obstacles(self) -> Iterator[str]:
        if not self.backends:
            yield f"its RAM is in no memory backend: start it with {_USE_FILE}"
        for backend in self.backends:
            if backend.kind == _MEMFD and self.version >= _SENDS_MEMFD:
                yield f"RAM {backend.id}: this QEMU sends a memfd itself: use {_USE_FILE}"
            elif backend.kind not in (_FILE, _MEMFD):
                yield f"RAM {backend.id} is a {backend.kind}, no other process can read it: use {_USE_FILE}"
            elif not backend.shared:
                yield f"RAM {backend.id} is share=off, so that no other process sees it: add share=on"

    def _device_obstacles(self) -> Iterator[str]:
        for device in self.devices:
            if device.startswith(_ASSIGNED):
                yield f"device {device}: its memory, or its writes, are not seen here: unplug it (device_del)"
        for reason in self.blocked:
            yield f"QEMU itself refuses: {reason}"


async def examine(monitor: Monitor) -> Inventory:
    """Ask for all of it: a dozen commands, several at a time, 5 ms. GuestError if QEMU does not answer."""
    ask = monitor.ask
    version, machine, status, migration, mtree, objects, devices, direct, balloon = await asyncio.gather(
        ask("query-version"),
        ask("qom-get", {"path": "/machine", "property": "type"}),
        ask("query-status"),
        ask("query-migrate"),
        ask("human-monitor-command", {"command-line": "info mtree -f"}),
        _children(monitor, "/objects"),
        _devices(monitor),
        _direct_drives(monitor),
        balloon_bytes(monitor),
    )
    backends, hint_socket, reports_free = await asyncio.gather(
        _backends(monitor, objects), _hint_socket(monitor, devices), _reports_free(monitor, devices)
    )
    number = version["qemu"]
    return Inventory(
        version=(number["major"], number["minor"], number["micro"]),
        machine=str(machine).removesuffix("-machine"),
        run_state=status["status"],
        backends=backends,
        devices=tuple(kind for _, kind in devices),
        direct_drives=direct,
        balloon_bytes=balloon,
        reports_free=reports_free,
        blocked=tuple(migration.get("blocked-reasons", ())),
        hint_socket=hint_socket,
        mtree=mtree,
        memos=tuple(name for name in objects if name.startswith(MEMO_PREFIX)),
    )


async def _children(monitor: Monitor, path: str) -> dict[str, str]:
    """Name to QOM type."""
    listed: list[dict[str, Any]] = await monitor.ask("qom-list", {"path": path})
    return {
        found["name"]: found["type"].removeprefix("child<").removesuffix(">")
        for found in listed
        if found["type"].startswith("child<")
    }


async def _devices(monitor: Monitor) -> list[tuple[str, str]]:
    """QOM path and type of each."""
    places = ("/machine/peripheral", "/machine/peripheral-anon")
    found = await asyncio.gather(*(_children(monitor, place) for place in places))
    return [
        (f"{place}/{name}", kind)
        for place, children in zip(places, found, strict=True)
        for name, kind in children.items()
    ]


async def _backends(monitor: Monitor, objects: dict[str, str]) -> tuple[Backend, ...]:
    found = []
    for listed in await monitor.ask("query-memdev"):
        name = str(listed.get("id", ""))
        kind = objects.get(name, "memory-backend-ram")
        path = ""
        if kind == _FILE:
            path = str(await monitor.ask("qom-get", {"path": f"/objects/{name}", "property": "mem-path"}))
        found.append(Backend(name, kind, int(listed["size"]), bool(listed.get("share")), path))
    return tuple(sorted(found, key=lambda backend: backend.id))


async def _direct_drives(monitor: Monitor) -> tuple[str, ...]:
    """Of all nodes, not only the topmost one of each drive: what is below it decides by itself."""
    direct = (
        node.get("file") or node["node-name"]
        for node in await monitor.ask("query-named-block-nodes")
        if node.get("cache", {}).get("direct") or node.get("drv") in _DMA_DRIVERS
    )
    return tuple(dict.fromkeys(direct))


async def balloon_bytes(monitor: Monitor) -> int:
    """See ``Inventory``."""
    try:
        return int((await monitor.ask("query-balloon"))["actual"])
    except CommandRefused:  # there is none
        return 0


async def _reports_free(monitor: Monitor, devices: list[tuple[str, str]]) -> bool:
    balloons = [path for path, kind in devices if kind.startswith("virtio-balloon")]
    asked = [
        await monitor.ask("qom-get", {"path": path, "property": "free-page-reporting"}) for path in balloons
    ]
    return any(asked)


async def _hint_socket(monitor: Monitor, devices: list[tuple[str, str]]) -> str:
    """Of the chardev behind the port, so that no other guest's hints can be taken for this one's.

    Refused if that is no unix socket on which QEMU listens.
    """
    for path, kind in devices:
        if kind != "virtserialport":
            continue
        try:
            name = await monitor.ask("qom-get", {"path": path, "property": "name"})
        except CommandRefused:  # unplugged meanwhile
            continue
        if name == HINT_PORT:
            label = await monitor.ask("qom-get", {"path": path, "property": "chardev"})
            for chardev in await monitor.ask("query-chardev"):
                if chardev["label"] == label:
                    return _unix_path(label, chardev["filename"])
    return ""


def _unix_path(label: str, filename: str) -> str:
    found = _UNIX.match(filename)
    if found is None:
        raise Refused(
            f"chardev {label} of {HINT_PORT} is {filename}: make it a unix socket, -chardev "
            f"socket,id={label},path=PATH,server=on,wait=off"
        )
    return found[1]
