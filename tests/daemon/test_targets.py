"""What a word on the command line names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from migd.daemon.targets import is_id_of, newest
from migd.errors import MigdError
from migd.migration.ports import Passage


@dataclass(frozen=True)
class Session:
    passage: Passage


def session(migration: str, guest: str) -> Session:
    return Session(Passage(migration.ljust(32, "0"), guest, "out", ""))


SESSIONS = [
    session("aaaa1", "vm1"), session("aaaa2", "vm2"), session("bbbb", "vm1"), session("cccc", "aaaa"),
    session("aaaa1", "vm1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "position"),
    [("vm2", 1), ("vm1", 4), ("bbbb", 2), ("aaaa1", 4), ("aaaa2", 1), ("bbbb".ljust(32, "0"), 2)],
)
def test_the_newest_that_is_named(target: str, position: int) -> None:
    assert newest(target, SESSIONS) is SESSIONS[position]


def test_a_guest_is_named_by_its_whole_name_even_if_that_begins_an_id() -> None:
    assert newest("aaaa", SESSIONS) is SESSIONS[3]


def test_the_beginning_of_several_ids() -> None:
    with pytest.raises(MigdError, match=r"'aaaa' is the beginning of several migrations: aaaa10+, aaaa20+"):
        newest("aaaa", [found for found in SESSIONS if found.passage.guest != "aaaa"])


@pytest.mark.parametrize("target", ["", "vm", "bbb", "BBBB", "dddd", "bbbb".ljust(33, "0"), "bbbb\n"])
def test_what_names_nothing(target: str) -> None:
    assert newest(target, SESSIONS) is None


def test_ids() -> None:
    assert is_id_of("0123", "0123" * 8)
    assert is_id_of("0123" * 8, "0123" * 8)
    assert not is_id_of("1230", "0123" * 8)
