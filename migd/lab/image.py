"""The lab's guest as QEMU boots it: a Debian kernel, an initramfs with Python, the agent and the workload."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from migd.lab import debian
from migd.lab.debian import Apt, LabUnavailable, Progress

_KERNEL = ("linux-image-cloud-amd64", r"linux-image-\d.*-cloud-amd64")
_PYTHON = ("python3-minimal", r"python3\.\d+-minimal")
_LIBRARIES = re.compile(r"libc6|libgcc-s1|zlib1g|libexpat1|libffi\d+\w*")

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_console",
    "virtio_balloon",
    "virtio_blk",
)
"""In the order in which they can be loaded; one that is built in, or not there, is left out."""

_SHARED = re.compile(r"usr/lib/x86_64-linux-gnu/(ld-linux|lib(c|m|dl|pthread|rt|gcc_s|z|expat|ffi)[.-])")
_EXTENSIONS = re.compile(
    r".*/lib-dynload/(_asyncio|_contextvars|_ctypes|_json|_multiprocessing|_posixshmem|_queue|mmap|resource|termios)\."
)
_NOT_USED = re.compile(
    r"usr/lib/python3[^/]*/(test|unittest|pydoc_data|distutils|lib2to3|idlelib|tkinter|turtle|config-)"
)

_COMPILE_S = 300.0
_STALE_S = 86400.0  # an initrd that nobody asked for since yesterday, of a migd that has changed since

_MIGD = Path(__file__).parent.parent
_OWN = {"migd/agent.py": _MIGD / "guest" / "agent.py", "migd/workload.py": _MIGD / "lab" / "workload.py"}
"""Files of the guest that change with migd, and where they come from."""

_INIT = """\
#!/bin/busybox sh
# Process 1 of the lab's guest.
B=/bin/busybox
export PATH=/usr/bin:/bin HOME=/tmp LC_ALL=C.UTF-8
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev
$B mount -t tmpfs tmpfs /tmp
exec </dev/null >/dev/console 2>&1
for module in MODULES; do
    if [ -f /lib/modules/$module.ko ]; then $B insmod /lib/modules/$module.ko; fi
done
agent=on
arguments=
for word in $($B cat /proc/cmdline); do
    case $word in
        migd.agent=off) agent=off ;;
        migd.agent_args=*) arguments=$(echo "${word#*=}" | $B tr , ' ') ;;
    esac
done
if [ $agent = on ] && [ -f /migd/agent.py ]; then
    while :; do
        PYTHON -S -E /migd/agent.py $arguments
        $B sleep 1
    done &
fi
PYTHON -S -E /migd/workload.py
echo "the workload ended: $?"
$B poweroff -f
"""


@dataclass(frozen=True)
class Image:
    """What QEMU's ``-kernel`` and ``-initrd`` take."""

    kernel: Path
    initrd: Path


def image(extra: Mapping[str, bytes] | None = None, *, progress: Progress = debian.silent) -> Image:
    """The guest with migd's files as they are now, and ``extra`` ones by their path in it.

    Made of Debian packages the first time, and cached. LabUnavailable where that cannot be done.
    """
    base = _base(progress)
    files = {name: path.read_bytes() for name, path in _OWN.items() if path.exists()}
    files |= {name.lstrip("/"): content for name, content in (extra or {}).items()}
    overlay = Archive()
    for name, content in sorted(files.items()):
        overlay.file(name, content)
    overlay.file("init", _init((base / "python").read_text()), executable=True)
    return Image(base / "vmlinuz", _joined(base / "base.cpio", overlay.finished()))


class Archive:
    """A cpio archive of the kind that Linux unpacks at boot (newc): the same entries give the same bytes.

    An archive may follow another; files of the later one replace those of the earlier.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0
        self._directories: set[str] = set()

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """A regular file of root's; ``name`` is relative to the root. Its directories are made."""
        self._parents(name)
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._parents(name)
        self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def directory(self, name: str) -> None:
        """A directory, once only."""
        if name not in self._directories:
            self._parents(name)
            self._directories.add(name)
            self._entry(name, stat.S_IFDIR | 0o755, b"")

    def finished(self) -> bytes:
        """All of it, with its end."""
        self._entry("TRAILER!!!", 0, b"")
        return bytes(self._data)

    def _parents(self, name: str) -> None:
        parent = PurePosixPath(name).parent
        if parent.name:
            self.directory(str(parent))

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._inode += 1
        path = os.fsencode(name) + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


def _base(progress: Progress) -> Path:
    """The directory with ``vmlinuz``, ``base.cpio`` and ``python``: what does not change with migd."""
    patterns = (_LIBRARIES, _SHARED, _EXTENSIONS, _NOT_USED)
    recipe = repr((_KERNEL, _PYTHON, MODULES, [pattern.pattern for pattern in patterns]))
    name = f"base-{hashlib.blake2b(recipe.encode(), digest_size=4).hexdigest()}"

    def build(target: Path) -> None:
        progress("guest image: about 40 MB of Debian packages, a minute at most")
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            root = Path(scratch) / "root"
            python = _unpack(Path(scratch), root)
            progress("guest image: compiling Python's library")
            _compile(root, python)
            (kernel,) = root.glob("boot/vmlinuz-*")
            kernel.rename(target / "vmlinuz")
            (target / "base.cpio").write_bytes(_archive(root).finished())
            (target / "python").write_text(python)

    return debian.built_once(debian.cache() / name, build)


def _unpack(scratch: Path, root: Path) -> str:
    """All packages, into ``root``; returns the name of the interpreter."""
    apt = Apt(scratch / "apt")
    minimal = apt.dependency(*_PYTHON)
    python = minimal.removesuffix("-minimal")
    needed = {
        *apt.dependencies(minimal, recurse=True),
        *apt.dependencies(f"lib{python}-stdlib", recurse=True),
    }
    libraries = sorted(filter(_LIBRARIES.fullmatch, needed))
    packages = scratch / "packages"
    packages.mkdir()
    apt.download(
        (
            apt.dependency(*_KERNEL),
            minimal,
            f"lib{python}-minimal",
            f"lib{python}-stdlib",
            "busybox-static",
            *libraries,
        ),
        packages,
    )
    debian.unpack(packages, root)
    return python


def _compile(root: Path, python: str) -> None:
    """Compiles Python's library with the very Python that will read it: under TCG that saves seconds."""
    (loader,) = (path for path in root.glob("**/ld-linux-x86-64.so.2") if "x86_64-linux-gnu" in path.parts)
    libraries = ":".join(str(root / lib / "x86_64-linux-gnu") for lib in ("lib", "usr/lib"))
    library = root / "usr" / "lib" / python
    command = (
        *(str(loader), "--library-path", libraries, str(root / "usr" / "bin" / python)),
        *(
            "-S",
            "-m",
            "compileall",
            "-q",
            "--invalidation-mode",
            "unchecked-hash",
            "-s",
            str(root),
            "-p",
            "/",
        ),
        *("-x", "/(test|lib2to3|idlelib)/", str(library)),
    )
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            env={"PYTHONHOME": str(root / "usr")},
            timeout=_COMPILE_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LabUnavailable(f"Debian's {python} does not run here: {error}") from error


def _archive(root: Path) -> Archive:
    """What the guest needs of the unpacked packages, all below /usr as Debian's installer has it."""
    archive = Archive()
    for name in ("bin", "sbin", "lib", "lib64"):
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    for name in ("dev", "proc", "sys", "tmp", "run", "migd"):
        archive.directory(name)
    found = {_merged(path.relative_to(root)): path for path in sorted(root.rglob("*")) if not path.is_dir()}
    for name, path in sorted(found.items()):
        if not _needed(name):
            continue
        if path.is_symlink():
            archive.link(name, str(path.readlink()))
        else:
            archive.file(name, path.read_bytes(), executable=os.access(path, os.X_OK))
    for name in MODULES:
        for path in root.glob(f"**/{name}.ko*"):
            archive.file(f"usr/lib/modules/{name}.ko", _module(path))
    return archive


def _merged(path: Path) -> str:
    """The path after the merge of /usr: packages of bookworm still have /bin and /lib."""
    return str(path if path.parts[0] in ("usr", "boot", "etc", "var") else "usr" / path)


def _needed(name: str) -> bool:
    if re.fullmatch(r"usr/bin/(busybox|python3\.\d+)|usr/lib64/ld-linux.*", name):
        return True
    if name.startswith("usr/lib/python3"):
        return bool(_EXTENSIONS.match(name)) if "/lib-dynload/" in name else not _NOT_USED.match(name)
    return bool(_SHARED.match(name))


def _module(path: Path) -> bytes:
    match path.suffix:
        case ".ko":
            return path.read_bytes()
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case suffix:
            raise LabUnavailable(f"{path.name}: kernel modules packed as {suffix} are not known here")


def _init(python: str) -> bytes:
    return _INIT.replace("MODULES", " ".join(MODULES)).replace("PYTHON", f"/usr/bin/{python}").encode()


def _joined(base: Path, overlay: bytes) -> Path:
    """The two archives as one file, named by what is in it."""
    content = base.read_bytes() + overlay
    name = hashlib.blake2b(content, digest_size=8).hexdigest()
    initrd = base.parent / f"initrd-{name}.cpio"
    with debian.locked(base.parent.parent):
        _forget_stale(base.parent)
        if initrd.exists():
            initrd.touch()
        else:
            with tempfile.NamedTemporaryFile(
                dir=base.parent, prefix="initrd-", suffix=".part", delete=False
            ) as file:
                file.write(content)
            Path(file.name).rename(initrd)
    return initrd


def _forget_stale(directory: Path) -> None:
    for path in directory.glob("initrd-*"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _STALE_S:
                path.unlink()
