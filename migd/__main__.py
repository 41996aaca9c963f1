"""``python -m migd`` and the ``migd`` command."""

from __future__ import annotations

from migd.cli.main import run

if __name__ == "__main__":
    run()
