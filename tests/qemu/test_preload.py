"""The preload library, built by the compiler that is here and loaded into real programs: Python and QEMU.

What it registered is read back from the kernel (``QemuProcess.tracked``), and what the process then writes
from the kernel's dirty log, exactly: nothing lost, nothing invented.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from migd.errors import ConfigError, ResourceError
from migd.qemu import preload
from migd.qemu.preload import PreloadUnavailable
from migd.qemu.process import QemuProcess
from migd.ram import linux
from migd.ram.block import PAGE_BYTES
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog
from tests.support.huge_pages import HUGE_BYTES, hugetlbfs, reserved

MIB = 1 << 20
WAIT_S = 30.0
"""No assertion is about time: this only ends a test that hangs."""

SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]

QEMU = shutil.which("qemu-system-x86_64")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64 is installed")

PROGRAM = """
import ctypes, json, mmap, os, resource, sys

FIXED, NUMBER = 0x10, {"x86_64": 9, "aarch64": 222}[os.uname().machine]
maps, libc = [], ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_long,)

def map(path, size, flags="MAP_SHARED", readonly=False, offset=0):
    fd = path if isinstance(path, int) else os.open(path, os.O_RDWR)
    maps.append(mmap.mmap(fd, size, getattr(mmap, flags),
                          mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE, offset=offset))

def write(number, pages):
    for page in pages:
        maps[number][page * 4096 + page % 4096] ^= 255

def unmap(number):
    maps[number].close()

def advise(number, advice, start, length):
    maps[number].madvise(getattr(mmap, advice), start, length)

def fork():
    child = os.fork()
    if not child:
        sys.stdin.read()
        os._exit(0)
    return child

def spawn(fifo):
    # Between vfork and exec the child has our memory; there it waits for somebody to open the FIFO.
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 9, fifo, os.O_RDONLY, 0)])

def raw(address, size, fd, offset, flags):
    # Behind the library's back.
    libc.syscall.restype = ctypes.c_void_p
    arguments = (address, size, 3, mmap.MAP_SHARED | flags, fd, offset)
    return libc.syscall(ctypes.c_long(NUMBER), *(ctypes.c_long(argument) for argument in arguments))

def map_raw_over(number, path, size):
    start = ctypes.addressof(ctypes.c_char.from_buffer(maps[number]))
    assert raw(start, size, os.open(path, os.O_RDWR), 0, FIXED) == start

def map_apart(path, first, size):
    # The first bytes of a file, and its rest at a distance.
    fd = os.open(path, os.O_RDWR)
    start = raw(0, first + size, -1, 0, mmap.MAP_ANONYMOUS)
    raw(start, first, fd, 0, FIXED)
    raw(start + 2 * first, size - first, fd, first, FIXED)

def leave_no_descriptor():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        os.close(taken.pop())

def errno_after(path, size):
    fd = os.open(path, os.O_RDWR) if path else -1
    ctypes.set_errno(77)
    mapped = libc.mmap(None, size, 3, 1, fd, 0)
    return [mapped != ctypes.c_void_p(-1).value, ctypes.get_errno()]

for line in sys.stdin:
    command, *arguments = json.loads(line)
    print(json.dumps(globals()[command](*arguments)), flush=True)
"""
"""Maps files and writes to them as told."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, where it can work.

    No userfaultfd at all is a reason to skip; one that lacks a feature is a failure.
    """
    try:
        os.close(linux.userfaultfd())
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip(f"this platform has no userfaultfd for us: {error.strerror}")
        raise
    return preload.library(tmp_path_factory.mktemp("cache") / "migd")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory of its own on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="migd-test-") as directory:
        yield Path(directory)


def ram_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


class Program:
    """PROGRAM, running; ``complaints`` is all that it said on stderr, when it has ended."""

    def __init__(
        self, env: dict[str, str], *, pass_fds: Sequence[int] = (), denied: int | None = None
    ) -> None:
        # The filter of system calls is set before the program is started, so the library meets it.
        deny = f"import os, sys; from tests.support.denied import deny; deny({denied})\n" if denied else ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", deny + PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            pass_fds=pass_fds,
            cwd=Path(__file__).resolve().parents[2],
        )
        self.complaints = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, *command: object) -> object:
        """Its answer."""
        self.begin(*command)
        return self.answer()

    def begin(self, *command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> object:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        assert answer, f"the program ended: {self._process.communicate()[1]}"
        return json.loads(answer)

    def end(self) -> None:
        if self._process.returncode is None:
            self.complaints += self._process.communicate(timeout=WAIT_S)[1]


@contextmanager
def program(
    env: dict[str, str], *, pass_fds: Sequence[int] = (), denied: int | None = None
) -> Iterator[Program]:
    running = Program(env, pass_fds=pass_fds, denied=denied)
    try:
        yield running
    finally:
        running.end()


class Qemu:
    """A stock QEMU with its RAM in a file, stopped before its first instruction; written to over qtest."""

    def __init__(
        self, ram: Path, size: int, env: dict[str, str], *, share: str = "on", extra: str = ""
    ) -> None:
        assert QEMU is not None
        ours, theirs = socket.socketpair()
        self._qtest = ours
        ours.settimeout(WAIT_S)
        mib = f"{size // MIB}M"
        self._process = subprocess.Popen(
            [
                *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-S"),
                *("-accel", "tcg,thread=single", "-m", mib),
                *("-object", f"memory-backend-file,id=ram,size={mib},mem-path={ram},share={share}"),
                *("-machine", "pc,memory-backend=ram"),
                *(
                    "-chardev",
                    f"socket,id=q,fd={theirs.fileno()}",
                    "-object",
                    "qtest,id=t,chardev=q,log=none",
                ),
                *extra.split(),
            ],
            env=env,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self._answers = ours.makefile("r")
        try:
            self.ask("endianness")  # it is all there once it answers
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str) -> str:
        self._qtest.sendall(command.encode() + b"\n")
        answer = self._answers.readline()
        assert answer.startswith("OK"), f"QEMU said {answer!r}"
        return answer

    def write(self, page: int) -> None:
        """Through the mapping, as a device of the machine does; below 3 GiB page and address are the same."""
        self.ask(f"write {page * PAGE_BYTES + page % 4089:#x} 0x8 0x{random.randbytes(8).hex()}")

    def end(self) -> None:
        self._answers.close()
        self._qtest.close()
        self._process.kill()
        self._process.wait(WAIT_S)


@contextmanager
def qemu(ram: Path, size: int, env: dict[str, str], *, share: str = "on", extra: str = "") -> Iterator[Qemu]:
    running = Qemu(ram, size, env, share=share, extra=extra)
    try:
        yield running
    finally:
        running.end()


def tracked(pid: int, file: Path | int) -> bool:
    fd = file if isinstance(file, int) else os.open(file, os.O_RDWR)
    process = QemuProcess(pid)
    try:
        return process.tracked(process.mapping_of(fd))
    finally:
        process.close()
        if fd != file:
            os.close(fd)


@contextmanager
def log_of(pid: int, file: Path) -> Iterator[Callable[[], set[int]]]:
    """The kernel's dirty log of it, as the daemon has it: called, it harvests."""
    process = QemuProcess(pid)
    fd = os.open(file, os.O_RDWR)
    mapping = process.mapping_of(fd)
    pages = mapping.bytes // PAGE_BYTES
    log = KernelDirtyLog(process.open_pagemap(), [ArmedRange(mapping.address, pages, 0)], pages)
    try:
        log.begin()
        yield lambda: set(log.collect().indices().tolist())
    finally:
        log.close()
        os.close(fd)
        process.close()


# -- what is tracked --------------------------------------------------------------------------------------


def test_a_named_file_is_tracked_and_what_the_process_writes_is_found_exactly(
    built: Path, memory: Path
) -> None:
    ram = ram_file(memory / "ram", 8 * MIB)
    env = preload.environment(os.environ, ["ram"], preload=built)
    with program(env) as writer:
        writer.do("map", str(ram), 8 * MIB)
        with log_of(writer.pid, ram) as harvest:
            for _ in range(20):
                pages = random.sample(range(2048), random.randrange(200))
                writer.do("write", 0, pages)
                assert harvest() == set(pages)
            assert harvest() == set()


def test_without_the_library_nothing_is_tracked(memory: Path) -> None:
    ram = ram_file(memory / "ram", 16 * MIB)
    with program(dict(os.environ)) as writer:
        writer.do("map", str(ram), 16 * MIB)
        assert not tracked(writer.pid, ram)


@pytest.mark.parametrize("by", ["path", "name", "link", "second"])
def test_a_file_is_known_by_path_or_name(built: Path, memory: Path, by: str) -> None:
    ram = ram_file(memory / "ram", MIB)
    (memory / "link").symlink_to(ram)
    names = {
        "path": [str(ram)],
        "name": ["ram"],
        "link": [str(memory / "link")],
        "second": ["other", "/dev/shm/ram", "ram"],
    }[by]
    with program(preload.environment(os.environ, names, preload=built)) as writer:
        writer.do("map", str(ram), MIB)
        assert tracked(writer.pid, ram)


@pytest.mark.parametrize("name", ["migd-ram", "memfd:migd-ram", "/memfd:migd-ram (deleted)"])
def test_a_memfd_is_known_by_its_name(built: Path, name: str) -> None:
    fd = os.memfd_create("migd-ram")
    os.ftruncate(fd, MIB)
    with program(preload.environment(os.environ, [name], preload=built), pass_fds=(fd,)) as writer:
        writer.do("map", fd, MIB)
        assert tracked(writer.pid, fd)
    os.close(fd)


def test_a_deleted_file_is_known_by_the_path_it_had(built: Path, memory: Path) -> None:
    ram = ram_file(memory / "ram", MIB)
    fd = os.open(ram, os.O_RDWR)
    ram.unlink()
    with program(preload.environment(os.environ, [ram], preload=built), pass_fds=(fd,)) as writer:
        writer.do("map", fd, MIB)
        assert tracked(writer.pid, fd)
    os.close(fd)


@pytest.mark.parametrize("name", ["ra", "ram2", "am", "/ram", "/dev/shm/ram"])
def test_another_name_is_not_tracked(built: Path, memory: Path, name: str) -> None:
    ram = ram_file(memory / "ram", 16 * MIB)
    with program(preload.environment(os.environ, [name], preload=built)) as writer:
        writer.do("map", str(ram), 16 * MIB)
        assert not tracked(writer.pid, ram)
    assert writer.complaints == ""


@pytest.mark.parametrize(("size", "expected"), [(16 * MIB, True), (16 * MIB - PAGE_BYTES, False)])
def test_without_names_a_file_in_memory_is_ram_from_16_mib_up(
    built: Path, memory: Path, size: int, expected: bool
) -> None:
    ram = ram_file(memory / "any", size)
    with program(preload.environment(os.environ, [], preload=built)) as writer:
        writer.do("map", str(ram), size)
        assert tracked(writer.pid, ram) is expected
    assert writer.complaints == ""


def test_without_names_a_large_file_on_a_disk_is_left_alone(built: Path, tmp_path: Path) -> None:
    file = ram_file(tmp_path / "database", 16 * MIB)
    with program(preload.environment(os.environ, [], preload=built)) as writer:
        writer.do("map", str(file), 16 * MIB)
        assert not tracked(writer.pid, file)
    assert writer.complaints == ""


def test_files_mapped_at_any_time_are_tracked_each_by_itself(built: Path, memory: Path) -> None:
    """Memory is plugged and unplugged while QEMU runs."""
    rams = [ram_file(memory / f"ram{number}", 2 * MIB) for number in range(3)]
    with program(preload.environment(os.environ, rams, preload=built)) as writer:
        writer.do("map", str(rams[0]), 2 * MIB)
        writer.do("map", str(rams[1]), 2 * MIB)
        with log_of(writer.pid, rams[1]) as harvest:
            writer.do("unmap", 0)
            writer.do("map", str(rams[2]), 2 * MIB)
            writer.do("write", 1, [1, 2])
            writer.do("write", 2, [3])
            assert harvest() == {1, 2}
        assert tracked(writer.pid, rams[2])


def test_huge_pages_are_tracked(built: Path, tmp_path: Path) -> None:
    with reserved(2), hugetlbfs(tmp_path, 2) as directory:
        ram = ram_file(directory / "ram", 2 * HUGE_BYTES)
        with program(preload.environment(os.environ, [], preload=built)) as writer:
            writer.do("map", str(ram), 2 * HUGE_BYTES)
            assert not tracked(writer.pid, ram)
        # The mapping is page by page shorter than what the kernel makes of it.
        with program(preload.environment(os.environ, ["ram"], preload=built)) as writer:
            writer.do("map", str(ram), 2 * HUGE_BYTES - PAGE_BYTES)
            with log_of(writer.pid, ram) as harvest:
                writer.do("write", 0, [700])
                assert harvest() == set(range(512, 1024))


# -- the process is not disturbed -------------------------------------------------------------------------


def test_errno_is_what_the_call_left(built: Path, memory: Path) -> None:
    ram = ram_file(memory / "ram", MIB)
    with program(preload.environment(os.environ, ["ram"], preload=built)) as writer:
        assert writer.do("errno_after", str(ram), MIB) == [True, 77]
        assert writer.do("errno_after", None, MIB) == [False, errno.EBADF]
        assert writer.do("errno_after", str(ram), 0) == [False, errno.EINVAL]


def test_a_kernel_without_userfaultfd_is_named_and_the_mapping_works(built: Path, memory: Path) -> None:
    ram = ram_file(memory / "ram", MIB)
    env = preload.environment(os.environ, ["ram"], preload=built)
    with program(env, denied=SYS_USERFAULTFD) as writer:
        writer.do("map", str(ram), MIB)
        writer.do("write", 0, [9])
        assert not tracked(writer.pid, ram)
    assert writer.complaints == (
        f"migd preload: {ram} stays untracked: userfaultfd: Function not implemented\n"
    )
    assert ram.read_bytes()[9 * PAGE_BYTES + 9] == 255


def test_a_process_without_descriptors_is_named_and_errno_kept(built: Path, memory: Path) -> None:
    ram = ram_file(memory / "ram", MIB)
    with program(preload.environment(os.environ, ["ram"], preload=built)) as writer:
        writer.do("leave_no_descriptor")
        assert writer.do("errno_after", str(ram), MIB) == [True, 77]
        assert not tracked(writer.pid, ram)
    assert f"{ram} stays untracked: userfaultfd: Too many open files" in writer.complaints


def test_a_named_file_on_a_disk_is_named_and_stays_untracked(built: Path, tmp_path: Path) -> None:
    """What userfaultfd sees of pages that are written back is not known, so it is not relied on."""
    file = ram_file(tmp_path / "ram", MIB)
    with program(preload.environment(os.environ, ["ram"], preload=built)) as writer:
        writer.do("map", str(file), MIB)
        assert not tracked(writer.pid, file)
    assert f"{file} stays untracked: not a file in memory" in writer.complaints


@pytest.mark.parametrize(("flags", "readonly"), [("MAP_PRIVATE", False), ("MAP_SHARED", True)])
def test_what_cannot_write_to_the_file_is_left_alone(
    built: Path, memory: Path, flags: str, readonly: bool
) -> None:
    ram = ram_file(memory / "ram", MIB)
    with program(preload.environment(os.environ, ["ram"], preload=built)) as writer:
        writer.do("map", str(ram), MIB, flags, readonly)
        links = [os.readlink(entry) for entry in Path(f"/proc/{writer.pid}/fd").iterdir()]
    assert not [link for link in links if "userfaultfd" in link]
    assert writer.complaints == ""


# -- QEMU ---------------------------------------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize(
    "extra",
    ["", "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    ids=["plain", "sandbox of libvirt"],
)
def test_a_stock_qemu_is_tracked_and_what_it_writes_is_found_exactly(
    built: Path, memory: Path, extra: str
) -> None:
    ram = memory / "ram"
    env = preload.environment(os.environ, [ram], preload=built)
    with qemu(ram, 64 * MIB, env, extra=extra) as guest, log_of(guest.pid, ram) as harvest:
        for _ in range(10):
            pages = random.sample(range(256, 64 * 256), 100)
            for page in pages:
                guest.write(page)
            assert harvest() == set(pages)
        assert harvest() == set()


@needs_qemu
def test_a_stock_qemu_without_the_library_is_not_tracked(memory: Path) -> None:
    with qemu(memory / "ram", 64 * MIB, dict(os.environ)) as guest:
        assert not tracked(guest.pid, memory / "ram")


@needs_qemu
def test_a_qemu_that_goes_into_the_background_is_tracked(built: Path, memory: Path) -> None:
    """It maps its RAM behind the fork: a userfaultfd serves the process that opened it, and no child."""
    assert QEMU is not None
    ram, pidfile = memory / "ram", memory / "pid"
    subprocess.run(
        [
            *(QEMU, "-nodefaults", "-display", "none", "-S", "-accel", "tcg,thread=single", "-m", "64M"),
            *("-object", f"memory-backend-file,id=ram,size=64M,mem-path={ram},share=on"),
            *("-machine", "pc,memory-backend=ram", "-daemonize", "-pidfile", str(pidfile)),
        ],
        env=preload.environment(os.environ, [ram], preload=built),
        check=True,
        timeout=WAIT_S,
    )
    pid = int(pidfile.read_text())
    try:
        assert tracked(pid, ram)
    finally:
        os.kill(pid, 9)


# -- the library --------------------------------------------------------------------------------------------


def test_it_is_built_once_and_for_everybody_to_read(tmp_path: Path) -> None:
    first = preload.library(tmp_path / "migd")
    made = first.stat()
    assert preload.library(tmp_path / "migd") == first
    assert first.stat() == made
    assert first.is_absolute()
    assert made.st_mode & 0o777 == 0o755
    assert (tmp_path / "migd").stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "migd") == [first.name]


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert preload.library().parent == tmp_path / "xdg/migd"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert preload.library().parent == tmp_path / "home/.cache/migd"


def test_several_may_build_at_once(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(preload.library(tmp_path / "migd"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert os.listdir(tmp_path / "migd") == [found[0].name]


@pytest.mark.parametrize("with_cc", [True, False])
def test_without_a_compiler_it_says_what_to_install_and_what_happens_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_cc: bool
) -> None:
    if with_cc:
        monkeypatch.setenv("CC", "/nonexistent/cc -m64")
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PreloadUnavailable) as caught:
        preload.library(tmp_path / "migd")
    said = str(caught.value)
    assert ("CC=/nonexistent/cc is no program" if with_cc else "none of cc, gcc, clang is installed") in said
    for word in ("apt-get install gcc libc6-dev", "soft-dirty", "comparing", "not asked for free pages"):
        assert word in said
    assert isinstance(caught.value, ResourceError)
    assert os.listdir(tmp_path / "migd") == []


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -include nowhere.h")
    with pytest.raises(PreloadUnavailable, match=r"gcc failed \(1\): .*nowhere\.h.*apt-get install"):
        preload.library(tmp_path / "migd")
    assert os.listdir(tmp_path / "migd") == []


def test_a_directory_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "migd").mkdir()
    (tmp_path / "migd").chmod(0o777)
    with pytest.raises(PreloadUnavailable, match=r"others can write to .*chmod go-w"):
        preload.library(tmp_path / "migd")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")
def test_a_directory_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "migd").mkdir()
    os.chown(tmp_path / "migd", 65534, 65534)
    with pytest.raises(PreloadUnavailable, match=r"belongs to another user \(uid 65534\)"):
        preload.library(tmp_path / "migd")


def test_a_link_to_a_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "migd").symlink_to("elsewhere")
    with pytest.raises(PreloadUnavailable, match="is no directory"):
        preload.library(tmp_path / "migd")


def test_a_path_that_the_linker_would_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreloadUnavailable, match="no path with a blank or a colon"):
        preload.library(tmp_path / "my cache")


def test_the_environment_keeps_what_was_preloaded_before(tmp_path: Path) -> None:
    library = tmp_path / "preload.so"
    assert preload.environment({"LD_PRELOAD": "/x.so /y.so", "A": "b"}, ["r"], preload=library) == {
        "A": "b",
        "LD_PRELOAD": f"{library}:/x.so /y.so",
        "MIGD_RAM": "r",
    }
    assert preload.environment({"MIGD_RAM": "old"}, [], preload=library) == {"LD_PRELOAD": f"{library}"}


@pytest.mark.parametrize("name", ["", "a:b", "/dev/shm/a:b", "memfd:"])
def test_a_name_that_cannot_be_told_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a name that is empty or has a colon"):
        preload.environment({}, [name], preload=tmp_path / "preload.so")
