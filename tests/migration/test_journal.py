"""The journal: what it says is durable, what a full disk leaves is cut off, garbage decides nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from migd.errors import ResourceError
from migd.migration.journal import FORMAT, CorruptJournal, Journal, Mark, NewerJournal, Record
from migd.wire.protocol import SOFTWARE

ID = "0123456789abcdef" * 2
OTHER = "f" * 32
AS_ROOT = os.getuid() == 0


def record(mark: Mark = Mark.GO, **fields: str) -> Record:
    return Record(**{"migration": ID, "mark": mark, "guest": "vm1", "peer": "127.0.0.1:7440", **fields})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal" / "source")


@pytest.fixture
def path(journal: Journal, tmp_path: Path) -> Path:
    return tmp_path / "journal" / "source" / f"{ID}.jsonl"


def test_what_was_appended_is_read_in_order(journal: Journal) -> None:
    written = [record(mark) for mark in (Mark.GO, Mark.STARTED, Mark.RELEASED)]
    for one in written:
        journal.append(one)
    assert journal.records(ID) == written
    assert journal.last(ID) == written[-1]


def test_another_process_reads_the_same(journal: Journal, tmp_path: Path) -> None:
    journal.append(record(detail='quotes " and\nline feeds and \x00 and ü'))
    again = Journal(tmp_path / "journal" / "source")
    assert again.records(ID) == journal.records(ID)
    assert again.last(ID).detail == 'quotes " and\nline feeds and \x00 and ü'


def test_an_unknown_migration_has_no_records(journal: Journal) -> None:
    assert journal.records(ID) == []
    assert journal.last(ID) is None


def test_migrations_do_not_mix(journal: Journal) -> None:
    journal.append(record())
    journal.append(record(Mark.ABORTED, migration=OTHER))
    assert journal.last(ID).mark is Mark.GO
    assert journal.last(OTHER).mark is Mark.ABORTED


def test_the_bytes_on_disk_are_one_json_line_a_record(journal: Journal, path: Path) -> None:
    journal.append(record())
    journal.append(record(Mark.STARTED, peer="", detail="x"))
    assert path.read_bytes() == (
        b'{"format":3,"software":"%s","migration":"%s","mark":"go","guest":"vm1","peer":"127.0.0.1:7440",'
        b'"detail":""}\n'
        b'{"format":3,"software":"%s","migration":"%s","mark":"started","guest":"vm1","peer":"","detail":"x"}\n'
    ) % (SOFTWARE.encode(), ID.encode(), SOFTWARE.encode(), ID.encode())


def test_only_the_owner_can_read_it(journal: Journal, path: Path) -> None:
    journal.append(record())
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "migration", ["", "..", "../../../etc/passwd", "x" * 32, ID + "\n", ID.upper(), ID[1:]]
)
def test_what_is_no_migration_id_never_is_a_path(journal: Journal, migration: str) -> None:
    with pytest.raises(ResourceError, match="no migration id"):
        journal.last(migration)
    with pytest.raises(ResourceError, match="no migration id"):
        journal.append(record(migration=migration))


# -- what a crash leaves --------------------------------------------------------------------------------


def test_a_line_torn_at_any_byte_is_as_if_it_had_not_been_written(journal: Journal, path: Path) -> None:
    journal.append(record())
    before = path.read_bytes()
    journal.append(record(Mark.STARTED))
    line = path.read_bytes()[len(before) :]
    for cut in range(len(line)):
        path.write_bytes(before + line[:cut])
        assert journal.last(ID) == record()
        journal.append(record(Mark.ABORTED))
        assert journal.records(ID) == [record(), record(Mark.ABORTED)]


def test_a_first_line_that_is_torn_is_no_record(journal: Journal, path: Path) -> None:
    path.write_bytes(b'{"format":1,"migr')
    assert journal.last(ID) is None
    journal.append(record())
    assert journal.records(ID) == [record()]


# -- what nobody wrote ----------------------------------------------------------------------------------

GOOD = msgspec.json.encode(record())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("garbage", b"garbage\n"),
        ("zeros", bytes(100) + b"\n"),
        ("an empty line", b"\n"),
        ("a bad line before a good one", b"{}\n" + GOOD + b"\n"),
        ("a bad line behind a good one", GOOD + b"\n{}\n"),
        ("a mark that is none", GOOD.replace(b'"go"', b'"gone"') + b"\n"),
        ("no mark", GOOD.replace(b'"mark":"go",', b"") + b"\n"),
        ("an unknown field", GOOD.replace(b'"detail"', b'"x":1,"detail"') + b"\n"),
        ("two records on a line", GOOD + GOOD + b"\n"),
        ("text that is not UTF-8", GOOD.replace(b"vm1", b"v\xff1") + b"\n"),
        ("nesting without end", GOOD.replace(b'"detail"', b'"x":' + b"[" * 10_000 + b',"detail"') + b"\n"),
    ],
)
def test_a_file_that_cannot_be_read_decides_nothing(
    journal: Journal, path: Path, name: str, content: bytes
) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptJournal, match=str(path)) as corrupt:
        journal.last(ID)
    assert corrupt.value.exit_code == 4
    assert "\n" not in str(corrupt.value)


# -- other formats --------------------------------------------------------------------------------------

FORMAT_1 = (
    b'{"format":1,"migration":"%s","mark":"go","guest":"vm1","peer":"h:1","detail":"d"}\n' % ID.encode()
)
FORMAT_2 = FORMAT_1.replace(b'{"format":1,', b'{"format":2,"software":"migd 0.1",')


@pytest.mark.parametrize(
    ("line", "number", "software"),
    [(FORMAT_1, 1, ""), (FORMAT_2, 2, "migd 0.1")],
    ids=["without software", "with it"],
)
def test_an_older_format_is_read_and_continued(
    journal: Journal, path: Path, line: bytes, number: int, software: str
) -> None:
    path.write_bytes(line)
    old = journal.last(ID)
    assert old == Record(
        format=number, software=software, migration=ID, mark=Mark.GO, guest="vm1", peer="h:1", detail="d"
    )
    journal.append(msgspec.structs.replace(old, mark=Mark.STARTED))
    first, second = journal.records(ID)
    assert first == old
    assert (second.format, second.software, second.mark, second.peer) == (
        FORMAT,
        SOFTWARE,
        Mark.STARTED,
        "h:1",
    )


@pytest.mark.parametrize(
    ("line", "writer"),
    [
        (b'{"format":4,"software":"migd 0.9","migration":7,"who":{"runs":"it"}}', "migd 0.9"),
        (b'{"format":4000}', "a later migd"),
        (b'{"format":4,"software":"migd\\u001b[31m"}', "a later migd"),
    ],
)
@pytest.mark.parametrize("before", [b"", FORMAT_1])
def test_a_newer_format_is_refused_with_who_wrote_it_and_what_to_do(
    journal: Journal, path: Path, before: bytes, line: bytes, writer: str
) -> None:
    """However different its lines are; one of them is enough."""
    path.write_bytes(before + line + b"\n")
    with pytest.raises(NewerJournal) as refused:
        journal.last(ID)
    assert str(refused.value) == (
        f"journal {path}: {writer} wrote it in format {msgspec.json.decode(line)['format']}, {SOFTWARE} "
        f"reads formats up to {FORMAT} and decides nothing from it: update migd here, or run the one that "
        "wrote it"
    )
    assert refused.value.exit_code == 4


@pytest.mark.parametrize("number", [b"0", b"-1", b'"2"', b"2.5", b"null"])
def test_a_format_that_is_no_format(journal: Journal, path: Path, number: bytes) -> None:
    path.write_bytes(GOOD.replace(b'"format":%d' % FORMAT, b'"format":' + number) + b"\n")
    with pytest.raises(CorruptJournal, match="resolve by hand"):
        journal.last(ID)


# -- all of them ----------------------------------------------------------------------------------------


def test_the_migrations_of_a_journal(journal: Journal, path: Path) -> None:
    assert journal.migrations() == []
    for migration in (OTHER, ID):
        journal.append(record(migration=migration))
    for name in ("notes.jsonl", f"{ID}.jsonl~", ID, f"{ID.upper()}.jsonl"):
        (path.parent / name).touch()
    assert journal.migrations() == [ID, OTHER]


def test_the_newest_record_about_a_guest(journal: Journal, path: Path) -> None:
    """Of the file written to last, not of the greatest id; what cannot be read says nothing."""
    assert journal.newest_of("vm1") is None
    journal.append(record(Mark.STARTED, migration=OTHER))
    journal.append(record(Mark.STARTED))
    journal.append(record(Mark.VERIFIED, migration=OTHER))
    times = {OTHER: 2_000_000_000, ID: 1_000_000_000}
    for migration, ns in times.items():
        os.utime(path.with_name(f"{migration}.jsonl"), ns=(ns, ns))
    assert journal.newest_of("vm1") == record(Mark.VERIFIED, migration=OTHER)
    assert journal.newest_of("vm2") is None
    path.with_name(f"{OTHER}.jsonl").write_bytes(b"garbage\n")
    assert journal.newest_of("vm1") == record(Mark.STARTED)


def test_a_forgotten_migration_is_unknown(journal: Journal) -> None:
    for migration in (OTHER, ID):
        journal.append(record(migration=migration))
    journal.forget(ID)
    journal.forget(ID)
    assert journal.last(ID) is None
    assert journal.migrations() == [OTHER]
    with pytest.raises(ResourceError, match="no migration id"):
        journal.forget("../x")


def test_a_directory_where_the_file_should_be(journal: Journal, path: Path) -> None:
    path.mkdir()
    with pytest.raises(CorruptJournal, match="Is a directory"):
        journal.last(ID)
    with pytest.raises(ResourceError, match="Is a directory"):
        journal.append(record())


def test_a_link_is_not_followed(journal: Journal, path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match=str(path)):
        journal.append(record())
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


# -- places that cannot be written ----------------------------------------------------------------------


def test_a_journal_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for where, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(ResourceError, match=f"journal directory {where}: {reason}"):
            Journal(where)


def test_a_journal_directory_that_went_away(journal: Journal, path: Path) -> None:
    path.parent.rmdir()
    with pytest.raises(ResourceError, match="No such file or directory"):
        journal.append(record())
    assert journal.last(ID) is None


def run_child(script: str, *arguments: object) -> str:
    """Output of Python code in a process of its own, in which ``journal`` and ``record`` are at hand."""
    preamble = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from migd.errors import ResourceError\n"
        "from migd.migration.journal import Journal, Mark, Record\n"
        f"record = Record(migration='{ID}', mark=Mark.STARTED, guest='vm1')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


APPEND = """
try:
    journal.append(record)
except ResourceError as error:
    print(error)
else:
    print("appended")
"""


@pytest.mark.skipif(not AS_ROOT, reason="only root can become somebody who may not write here")
@pytest.mark.parametrize("mode", [0o500, 0o300], ids=["read-only", "not readable"])
def test_a_directory_without_permission(tmp_path: Path, mode: int) -> None:
    """Not readable: its entries cannot be made durable, so there must be no record either."""
    directory = tmp_path / "source"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    directory.chmod(mode)
    below = [tmp_path, *tmp_path.parents]
    modes = [(one, one.stat().st_mode) for one in below]
    for one in below[:-1]:
        one.chmod(one.stat().st_mode | 0o011)
    try:
        said = run_child(
            "journal = Journal(Path(sys.argv[1]))\nos.setgid(65534)\nos.setuid(65534)\n" + APPEND, directory
        )
    finally:
        for one, before in modes:
            one.chmod(before)
    assert said == f"journal {directory / ID}.jsonl: Permission denied"
    assert Journal(directory).last(ID) is None


def test_a_record_that_does_not_fit_did_not_happen(journal: Journal, path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel write half of it, like a disk that is full."""
    journal.append(record())
    before = path.read_bytes()
    said = run_child(
        "journal = Journal(Path(sys.argv[1]))\n"
        "limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n" + APPEND,
        path.parent,
        len(before) + 20,
    )
    assert said == f"journal {path}: No space left on device"
    assert path.read_bytes() == before
    journal.append(record(Mark.ABORTED))
    assert journal.records(ID) == [record(), record(Mark.ABORTED)]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    if not AS_ROOT or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(tiny_disk: Path) -> None:
    journal = Journal(tiny_disk / "source")
    journal.append(record())
    with (tiny_disk / "filler").open("wb", buffering=0) as filler:
        with suppress(OSError):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(ResourceError, match="No space left on device"):
            journal.append(record(migration=OTHER))
        assert journal.last(OTHER) is None
        assert journal.last(ID) == record()
        filler.truncate(0)
        journal.append(record(migration=OTHER))
    assert journal.last(OTHER) == record(migration=OTHER)
