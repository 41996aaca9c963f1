"""Settings: QEMU's migration capabilities and parameters: migd's while a guest moves, its own afterwards."""

from __future__ import annotations

import msgspec

from migd.errors import Refused
from migd.qemu.monitor import Monitor

_NEEDED = ("x-ignore-shared", "events")
"""RAM stays out of the stream; everything else is off: a `multifd` left over on one side silently drops ROM
pages when the stream takes one connection."""

_NO_LIMIT_BYTES_S = 1 << 40
"""The device state is a few hundred KB, and the guest is paused while it is saved."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a QEMU had, or is to have."""

    capabilities: dict[str, bool]
    max_bandwidth: int
    tls_creds: str

    @classmethod
    async def of(cls, monitor: Monitor) -> Settings:
        """As they are now."""
        capabilities = await monitor.ask("query-migrate-capabilities")
        parameters = await monitor.ask("query-migrate-parameters")
        return cls(
            capabilities={each["capability"]: each["state"] for each in capabilities},
            max_bandwidth=parameters["max-bandwidth"],
            tls_creds=parameters.get("tls-creds", ""),
        )

    def for_migd(self) -> Settings:
        """Those under which only the device state goes into the stream. Refused by a QEMU before 4.0."""
        if missing := set(_NEEDED) - set(self.capabilities):
            raise Refused(f"this QEMU cannot leave RAM out of a migration ({', '.join(sorted(missing))})")
        ours = {name: name in _NEEDED for name in self.capabilities}
        return Settings(ours, max(self.max_bandwidth, _NO_LIMIT_BYTES_S), "")

    async def apply(self, monitor: Monitor) -> None:
        """CommandRefused while a migration of QEMU's own goes on."""
        listed = [{"capability": name, "state": state} for name, state in self.capabilities.items()]
        await monitor.ask("migrate-set-capabilities", {"capabilities": listed})
        await monitor.ask(
            "migrate-set-parameters", {"max-bandwidth": self.max_bandwidth, "tls-creds": self.tls_creds}
        )
