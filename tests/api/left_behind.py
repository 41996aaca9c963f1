"""What a script has left behind below one directory."""

from __future__ import annotations

import os
from pathlib import Path


def naming(directory: Path) -> list[str]:
    """Command lines that name a directory, and what lies in it."""
    found = [str(path) for path in directory.iterdir()]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if os.fsencode(directory) in line:
            found.append(line.replace(b"\0", b" ").decode())
    return found
