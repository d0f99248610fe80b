"""Space for a mapped file is reserved by the system on Linux and by fcntl on macOS, which is simulated."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest

from mebp_mlx.system import files

pytestmark = pytest.mark.quick

N_BYTES = 5 << 14
# flags of the two calls: contiguous and complete, then complete
CALLS = [(42, 6, 3, 0, N_BYTES, 0), (42, 4, 3, 0, N_BYTES, 0)]


def _on_macos(monkeypatch: pytest.MonkeyPatch, answers: list[int]) -> list[tuple[int, ...]]:
    """Records fcntl's requests as on macOS; each call returns the given error number (0: success)."""
    asked: list[tuple[int, ...]] = []

    def fcntl(descriptor: int, command: int, fstore: bytes) -> bytes:
        assert os.fstat(descriptor).st_size == 0  # before the file's length is set
        asked.append((command, *struct.unpack("=Iiqqq", fstore)))
        if error := answers[len(asked) - 1]:
            raise OSError(error, os.strerror(error))
        return fstore

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(fcntl=fcntl))
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="darwin"))
    return asked


def test_space_is_reserved_on_this_system() -> None:
    with tempfile.TemporaryFile() as file:
        files.reserve(file.fileno(), N_BYTES)
        about = os.fstat(file.fileno())
        assert about.st_size == N_BYTES and about.st_blocks * 512 >= N_BYTES


@pytest.mark.parametrize("answers", [[0], [errno.ENOSPC, 0], [errno.EINVAL, errno.ENOTSUP]])
def test_macos_reserves_one_piece_or_several_or_fails(monkeypatch: pytest.MonkeyPatch, answers: list[int]) -> None:
    asked = _on_macos(monkeypatch, answers)
    with tempfile.TemporaryFile() as file:
        files.reserve(file.fileno(), N_BYTES)
        assert os.fstat(file.fileno()).st_size == N_BYTES
    assert asked == CALLS[: len(answers)]


@pytest.mark.parametrize("full", ["told", "asked"])
def test_a_full_disk_on_macos(monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    """Detected by fcntl, or by the free space if the file system reserves nothing."""
    _on_macos(monkeypatch, [errno.ENOSPC, errno.ENOSPC if full == "told" else errno.ENOTSUP])
    if full == "asked":
        disk: Any = SimpleNamespace(f_bavail=1, f_frsize=4096)
        monkeypatch.setattr(os, "fstatvfs", lambda descriptor: disk)
    with tempfile.TemporaryFile() as file:
        with pytest.raises(OSError) as caught:
            files.reserve(file.fileno(), N_BYTES)
        assert caught.value.errno == errno.ENOSPC and os.fstat(file.fileno()).st_size == 0
