"""System: the text files in which the kernel says how it is set, below one root."""

from __future__ import annotations

from pathlib import Path


class System:
    """The running system; with another root, a copy of the files of some other one."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def text(self, path: str) -> str:
        """A file of /proc or /sys without blanks around it; empty if there is none, or not for us."""
        try:
            return (self._root / path).read_text().strip()
        except OSError:
            return ""

    def meminfo(self, key: str) -> int:
        """A line of /proc/meminfo in bytes, or in pages for those that count pages; 0 if there is none."""
        for line in self.text("proc/meminfo").splitlines():
            name, value, *unit = line.split()
            if name == f"{key}:":
                return int(value) * (1024 if unit else 1)
        return 0

    def numbers(self, path: str) -> list[int]:
        """All numbers of a file such as /proc/sys/net/ipv4/tcp_rmem; none if there is no such file."""
        return [int(word) for word in self.text(path).split()]
