"""What a daemon of the soak spawns for a guest that comes: it has the cradle fork one, and lives as long.

Run as ``python -IS incoming.py CRADLE SOCKET NAME MIGRATION``: with nothing to import it is there in 10 ms,
where an interpreter with numpy takes 150.
"""

import json
import socket
import sys


def main() -> None:
    cradle, daemon, name, migration = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(cradle)
        line.sendall(json.dumps({"daemon": daemon, "name": name, "migration": migration}).encode() + b"\n")
        while line.recv(1):  # until the guest has ended; and if this is killed, the guest sees the end of it
            pass


if __name__ == "__main__":
    main()
