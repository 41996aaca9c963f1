"""``python -m migd.lab``: prepares the lab's guest and emulators; with ``boot`` it tries them, once."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from migd.errors import MigdError
from migd.lab.emulators import Emulator, compiler, emulators
from migd.lab.image import Image, image
from migd.lab.workbench import Recipe, boot

_HOG_S = 120.0
_CHECK_S = 60.0


def main() -> int:
    """The exit code: 3 where this host cannot do it."""
    parser = argparse.ArgumentParser(prog="python -m migd.lab", description=__doc__)
    parser.add_argument("do", nargs="?", choices=("prepare", "boot"), default="prepare")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        guest = image(progress=_say)
        _say(f"guest image: {guest.kernel} and {guest.initrd}, {guest.initrd.stat().st_size >> 20} MiB")
        found = emulators(progress=_say)
        for emulator in found:
            _say(f"{emulator}: {emulator.command[0]}")
        _say(f"C compiler: {compiler(progress=_say)}")
        if options.do == "boot":
            _try(found[-1], guest)
    except MigdError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _try(emulator: Emulator, guest: Image) -> None:
    recipe = Recipe(emulator, guest)
    began_s = time.monotonic()
    with boot(recipe) as booted:
        booted.await_ready()
        _say(f"guest: ready {time.monotonic() - began_s:.1f} s after the start of {emulator}")
        booted.workload.ask("hog", _HOG_S, bytes=recipe.ram_bytes // 2)
        _say(f"guest: {recipe.ram_bytes >> 21} MiB written and freed")
        for name, value in booted.workload.ask("status").items():
            _say(f"  {name}: {value}")
        _say(f"check: {booted.workload.ask('check', _CHECK_S)}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
