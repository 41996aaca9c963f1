"""RamSupply: the RAM of a daemon's guests: made for those that have none, checked when they bring it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from migd.errors import MigdError, Refused
from migd.guest.control import MAX_BLOCKS
from migd.ram.block import BlockShape, RamBlock
from migd.ram.layout import RamLayout
from migd.ram.provider import RamProvider


class RamSupply:
    """Gives RAM of one kind, as far as the host has any that is not promised to a guest already."""

    def __init__(self, provider: RamProvider, in_use: Callable[[], Iterable[RamLayout]]) -> None:
        """``in_use``: the RAM of the guests that are here."""
        self._provider = provider
        self._in_use = in_use

    def free_bytes(self) -> int:
        """What a guest would be given now. ResourceError if the host does not tell."""
        return self._provider.room(self._promised_bytes()).free_bytes

    def make(self, guest: str, shapes: Sequence[BlockShape]) -> RamLayout:
        """Fresh zero RAM (R11). ResourceError without room for it, Refused if it cannot be of this kind."""
        if not 0 < len(shapes) <= MAX_BLOCKS:
            raise Refused(f"a guest has 1 to {MAX_BLOCKS} RAM blocks, not {len(shapes)}")
        wanted = sum(shape.bytes for shape in shapes)
        self._provider.room(self._promised_bytes()).require(wanted)
        blocks: list[RamBlock] = []
        try:
            for shape in shapes:
                blocks.append(self._provider.create(guest, shape))  # noqa: PERF401  # those made so far
        except MigdError:
            made = RamLayout(blocks)
            made.unlink()
            made.close()
            raise
        return RamLayout(blocks)

    def adopt(self, shapes: Sequence[BlockShape], fds: Sequence[int], *, read_only: bool) -> RamLayout:
        """RAM that a guest brings, of whatever kind; ``fds`` are ours if this succeeds. GuestError if not."""
        if len(fds) != len(shapes):
            raise Refused(f"{len(shapes)} RAM blocks and {len(fds)} descriptors")
        blocks = [
            RamBlock.adopt(shape, fd, read_only=read_only) for shape, fd in zip(shapes, fds, strict=True)
        ]
        for block in blocks:
            self._provider.recognise(block)
        return RamLayout(blocks)

    def _promised_bytes(self) -> int:
        """What guests here have not touched yet of their RAM, but may at any time."""
        return sum(block.promised_bytes for ram in self._in_use() for block in ram.blocks)
