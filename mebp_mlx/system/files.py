"""Files and folders that are either complete or absent: reserved space, flushed writes, renaming on completion."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import UserError

# From macOS's sys/fcntl.h, documented in fcntl(2). On APFS a sparse file reserves no space.
_F_PREALLOCATE, _F_PEOFPOSMODE = 42, 3
_F_ALLOCATECONTIG, _F_ALLOCATEALL = 2, 4
_FSTORE = struct.Struct("=Iiqqq")  # fstore_t: flags, position mode, offset, length, bytes allocated
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_OFFERED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)


def reserve(descriptor: int, n_bytes: int) -> None:
    """Extends an empty file to n_bytes and reserves the space, since a map reports a full disk only by a signal.

    Raises OSError with ENOSPC, EFBIG or EDQUOT if there is not enough.
    """
    if sys.platform != "darwin":
        os.posix_fallocate(descriptor, 0, n_bytes)
        return
    if not _preallocate(descriptor, n_bytes):
        disk = os.fstatvfs(descriptor)
        if disk.f_bavail * disk.f_frsize < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, n_bytes)


def _preallocate(descriptor: int, n_bytes: int) -> bool:
    """Reserves space in one piece if possible, else in several; False if the file system cannot reserve space."""
    for flags in (_F_ALLOCATECONTIG | _F_ALLOCATEALL, _F_ALLOCATEALL):
        try:
            fcntl.fcntl(descriptor, _F_PREALLOCATE, _FSTORE.pack(flags, _F_PEOFPOSMODE, 0, n_bytes, 0))
            return True
        except OSError as error:
            if flags == _F_ALLOCATEALL and error.errno not in _NOT_OFFERED:
                raise
    return False


def flush(file: Any) -> None:
    """Flushes an open file's content to disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], flag: str) -> None:
    """Replaces `path` with what `write` writes to a binary file, or leaves it unchanged.

    The file is written under a temporary name in the same folder, flushed to disk and then renamed, so a reader sees
    either the old state or the new one. Raises UserError naming `flag` if writing fails.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            flush(file)
        os.replace(partial, path)
        flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises FileNotFoundError if the file is missing, else UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must contain a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any], flag: str) -> None:
    """Writes a JSON object, indented, with write_atomically."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), flag)


class NewFolder:
    """A new or empty folder that gets its name only when it is complete.

    As a context manager it creates `partial`, a hidden folder with the same parent, which `publish` renames; otherwise
    it is removed at the end. remove_leftovers removes the partial folders of killed processes and lists them in
    `removed`; a live process holds a lock on its own. Raises UserError naming `flag`.
    """

    def __init__(self, path: str | Path, flag: str) -> None:
        self.shown = f"{flag} {path}"
        self.path = Path(path).expanduser().resolve()
        self.removed: list[Path] = []
        self._lock: int | None = None
        self.partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")

    def check(self) -> None:
        """Raises UserError if the name is taken."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.shown}: is a file")
        if os.path.ismount(self.path):
            raise UserError(f"{self.shown}: is a mount point; name a folder inside it")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.shown}: exists and is not empty")

    def check_space(self, n_bytes: int) -> None:
        """Raises UserError if the disk has too little free space."""
        parent = next(folder for folder in self.path.parents if folder.exists())
        free_bytes = shutil.disk_usage(parent).free
        if free_bytes < n_bytes * 1.01:
            needed, free = f"{n_bytes / 1e9:,.2f} GB", f"{free_bytes / 1e9:,.2f} GB"
            raise UserError(f"{self.shown}: needs {needed} of disk space, {free} is free")

    def remove_leftovers(self) -> None:
        """Removes partial folders whose process has ended."""
        pattern = re.compile(rf"\.{re.escape(self.path.name)}\.\d+\.partial")
        if not self.path.parent.is_dir():
            return
        for folder in self.path.parent.iterdir():
            if not pattern.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            try:
                descriptor = _locked(folder)
            except OSError:  # a file system without locks
                raise UserError(f"{self.shown}: remove {folder} if no process is writing it") from None
            if descriptor is None:
                raise UserError(f"{self.shown}: another process is writing it, in {folder.name}")
            os.close(descriptor)
            shutil.rmtree(folder)
            self.removed.append(folder)

    def __enter__(self) -> NewFolder:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir()
        with contextlib.suppress(OSError):
            self._lock = _locked(self.partial)
        return self

    def publish(self) -> None:
        """Renames the folder to its final name. All files in it must have been flushed."""
        flush_folder(self.partial)
        os.rename(self.partial, self.path)
        flush_folder(self.path.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed, at the latest when the process ends.

    None if another process holds the lock. Raises OSError on a file system without locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor
