"""RuntimeDir: a daemon's directory is its user's, private, and one daemon's at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migd.errors import ResourceError
from migd.host import RuntimeDir


def test_it_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "migd" / "source"
    with RuntimeDir(path) as entered:
        assert entered == path
        assert path.stat().st_mode & 0o777 == 0o700
    with RuntimeDir(path):  # and again, after a restart
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_directory_open_to_others_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.mkdir(mode=0o755)
    with RuntimeDir(path):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    with RuntimeDir(tmp_path / "one"), pytest.raises(ResourceError, match="another migd daemon uses"):
        RuntimeDir(tmp_path / "one").__enter__()


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match="not a directory of this user"):
        RuntimeDir(tmp_path / "link").__enter__()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize(("whose", "reason"), [("parent", "another user"), ("itself", "of this user")])
def test_a_directory_of_another_user_is_refused(tmp_path: Path, whose: str, reason: str) -> None:
    path = tmp_path / "parent" / "source"
    path.mkdir(parents=True)
    os.chown(path.parent if whose == "parent" else path, 12345, -1)
    with pytest.raises(ResourceError, match=reason):
        RuntimeDir(path).__enter__()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="too long for a unix socket path"):
        RuntimeDir(tmp_path / ("x" * 100)).__enter__()
