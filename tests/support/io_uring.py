"""One io_uring with one request in it at a time: reads from a file into memory, as a guest's device might."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import TracebackType

_SETUP, _ENTER, _REGISTER = 425, 426, 427
"""System calls: the same numbers on every machine."""

_PARAMETERS = struct.Struct("<30I")
"""``struct io_uring_params``: ten words, then the offsets of both rings, ten words each."""
_SUBMISSION = struct.Struct("<BBHiQQIIQHHIQQ")
_COMPLETION = struct.Struct("<QiI")
_SUBMISSIONS_AT, _COMPLETIONS_AT, _ENTRIES_AT = 0, 0x8000000, 0x10000000

_READ_FIXED, _READ = 4, 22
_REGISTER_BUFFERS = 0
_GETEVENTS = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"io_uring: {os.strerror(code)}")
    return result


class Ring:
    """OSError (ENOSYS, EPERM) where there is no io_uring for us."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(_PARAMETERS.size)
        self._fd = _call(_SETUP, 1, parameters)
        words = _PARAMETERS.unpack(parameters.raw)
        entries, completions = words[0], words[1]
        _, self._tail, _, _, _, _, self._array = words[10:17]
        self._head, _, _, _, _, self._results = words[20:26]
        self._submissions = self._map(_SUBMISSIONS_AT, self._array + 4 * entries)
        self._completions = self._map(_COMPLETIONS_AT, self._results + _COMPLETION.size * completions)
        self._entries = self._map(_ENTRIES_AT, _SUBMISSION.size * entries)
        self._count = 0
        self._completion_count = completions

    def _map(self, offset: int, size: int) -> mmap.mmap:
        return mmap.mmap(self._fd, size, offset=offset)

    def pin(self, address: int, length: int) -> None:
        """Hold the pages there: reads that are ``pinned`` go into them without a look at the mapping."""
        vector = struct.pack("<QQ", address, length)
        _call(_REGISTER, self._fd, _REGISTER_BUFFERS, ctypes.create_string_buffer(vector), 1)

    def read(self, fd: int, address: int, length: int, *, pinned: bool = False) -> int:
        """Read from the beginning of a file into memory; how many bytes. OSError as the request ended."""
        operation = _READ_FIXED if pinned else _READ
        entry = _SUBMISSION.pack(operation, 0, 0, fd, 0, address, length, 0, 1, 0, 0, 0, 0, 0)
        self._entries[: _SUBMISSION.size] = entry
        struct.pack_into("<I", self._submissions, self._array, 0)
        struct.pack_into("<I", self._submissions, self._tail, self._count + 1)
        _call(_ENTER, self._fd, 1, 1, _GETEVENTS, None, 0)
        at = self._results + _COMPLETION.size * (self._count % self._completion_count)
        _, result, _ = _COMPLETION.unpack_from(self._completions, at)
        self._count += 1
        struct.pack_into("<I", self._completions, self._head, self._count)
        if result < 0:
            raise OSError(-result, f"io_uring: {os.strerror(-result)}")
        return int(result)

    def close(self) -> None:
        for mapping in (self._submissions, self._completions, self._entries):
            mapping.close()
        os.close(self._fd)

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
