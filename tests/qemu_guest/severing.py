"""Cutting a connection between two other processes: as if either had closed it."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
from pathlib import Path

_SYS_PIDFD_GETFD = {"x86_64": 438, "aarch64": 438}
_libc = ctypes.CDLL(None, use_errno=True)


def sever(pid: int, path: Path) -> None:
    """Shut down the connection that this process has to the Unix socket at ``path``."""
    pidfd = os.pidfd_open(pid)
    try:
        found = [sock for entry in os.listdir(f"/proc/{pid}/fd") if (sock := _socket(pidfd, int(entry)))]
        ours = [sock for sock in found if _peer(sock) == str(path)]
        assert len(ours) == 1, f"process {pid} has {len(ours)} connections to {path}"
        ours[0].shutdown(socket.SHUT_RDWR)
        for sock in found:
            sock.close()
    finally:
        os.close(pidfd)


def _socket(pidfd: int, number: int) -> socket.socket | None:
    """Another process's descriptor as our own, if it is a Unix socket."""
    fd = _libc.syscall(_SYS_PIDFD_GETFD[platform.machine()], pidfd, number, 0)
    if fd < 0:  # closed meanwhile
        return None
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    if sock.family is socket.AF_UNIX:
        return sock
    sock.close()
    return None


def _peer(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername())
    except OSError:  # it listens
        return ""
