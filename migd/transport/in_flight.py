"""SharedRoom: the buffers of a daemon's frames in flight in one direction, awaited.

Who gets one next, and why nobody waits for ever, is said in ``migd.migration.in_flight``.
"""

from __future__ import annotations

from migd.migration.in_flight import FrameRoom, Request, Tenant
from migd.transport.turns import Turns
from migd.wire.protocol import MAX_PAYLOAD_BYTES


class SharedRoom:
    """All migrations of one direction. Buffers are made when first needed and kept while a migration runs."""

    def __init__(self, frames: int) -> None:
        self._room = FrameRoom(frames)
        self._tenants: set[Tenant] = set()
        self._turns: Turns[Request] = Turns(self._withdraw)
        self._idle: list[bytearray] = []

    def open(self) -> MigrationRoom:
        """For one migration; to be closed."""
        tenant = Tenant()
        self._tenants.add(tenant)
        return MigrationRoom(self, tenant)

    def close(self, tenant: Tenant) -> None:
        self._tenants.discard(tenant)
        if not self._tenants:
            self._idle.clear()

    @property
    def wanted(self) -> bool:
        """Somebody waits for room."""
        return self._room.waiting

    async def take(self, tenant: Tenant) -> tuple[Request, bytearray]:
        request = self._room.ask(tenant)
        self._serve()
        if not request.granted:
            await self._turns.of(request)
        return request, self._idle.pop() if self._idle else bytearray(MAX_PAYLOAD_BYTES)

    def give_back(self, request: Request, buffer: bytearray) -> None:
        self._idle.append(buffer)
        self._withdraw(request)

    def _withdraw(self, request: Request) -> None:
        self._room.give_back(request)
        self._serve()

    def _serve(self) -> None:
        self._turns.grant(self._room.grant())


class MigrationRoom:
    """See ``migd.migration.ports.Room``."""

    def __init__(self, shared: SharedRoom, tenant: Tenant) -> None:
        self._shared = shared
        self._tenant = tenant

    def slot(self) -> Slot:
        return Slot(self._shared, self._tenant)

    def close(self) -> None:
        """The migration is over: its streams hold nothing any more."""
        self._shared.close(self._tenant)


class Slot:
    """See ``migd.migration.ports.Slot``."""

    def __init__(self, shared: SharedRoom, tenant: Tenant) -> None:
        self._shared = shared
        self._tenant = tenant
        self._held: tuple[Request, bytearray] | None = None

    @property
    def wanted(self) -> bool:
        return self._held is not None and self._shared.wanted

    async def take(self) -> memoryview:
        if self._held is None:
            self._held = await self._shared.take(self._tenant)
        return memoryview(self._held[1])

    def give_back(self) -> None:
        if self._held is not None:
            self._shared.give_back(*self._held)
            self._held = None
