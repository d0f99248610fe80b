"""Room on a disk for a mapped file, taken before the first write: a map reports a full disk by a signal."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys

# macOS's sys/fcntl.h, as fcntl(2) documents them: a sparse file reserves nothing on APFS
_F_PREALLOCATE, _F_PEOFPOSMODE = 42, 3
_F_ALLOCATECONTIG, _F_ALLOCATEALL = 2, 4
_FSTORE = struct.Struct("=Iiqqq")  # fstore_t: flags, position mode, offset, length, and what was allocated
_NOT_OFFERED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)


def reserve(descriptor: int, n_bytes: int) -> None:
    """Makes an empty file n_bytes long and takes its room on the disk.

    OSError with ENOSPC, EFBIG or EDQUOT where there is none.
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
    """In one piece, else in pieces; False on a file system that cannot."""
    for flags in (_F_ALLOCATECONTIG | _F_ALLOCATEALL, _F_ALLOCATEALL):
        try:
            fcntl.fcntl(descriptor, _F_PREALLOCATE, _FSTORE.pack(flags, _F_PEOFPOSMODE, 0, n_bytes, 0))
            return True
        except OSError as error:
            if flags == _F_ALLOCATEALL and error.errno not in _NOT_OFFERED:
                raise
    return False
