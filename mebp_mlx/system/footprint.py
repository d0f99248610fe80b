"""The process footprint and its peaks: the figures that are printed as memory.

macOS: phys_footprint. Linux: RssAnon + VmSwap, that is, anonymous memory, resident or swapped out. Neither includes
clean pages of mapped files. Linux records no high-water mark of it, so a thread samples it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType

_INTERVAL_S = 0.002
_MAX_INTERVAL_S = 0.006  # three samples in 20 ms, however slow a sample is
_MAX_LOAD = 0.01  # the sampling thread's share of one core
_N_SAMPLES = 100  # between two measurements of the sampling cost

_STATUS_BYTES = 8192
_FOOTPRINT_FIELD, _LIFETIME_MAX_FIELD = 7, 28  # index in rusage_info_v4, in u64 after its 16-byte uuid
_RUSAGE_INFO_V4, _RUSAGE_BYTES = 4, 296


def footprint_bytes() -> int:
    """The current footprint of this process in bytes, including interpreter and libraries.

    Raises OSError on systems other than Linux and macOS.
    """
    return _darwin_rusage()[_FOOTPRINT_FIELD] if sys.platform == "darwin" else _linux_footprint()


_status_fd: tuple[int, int] | None = None  # (pid, descriptor): a forked child must not read its parent's


def _linux_footprint() -> int:
    global _status_fd
    pid = os.getpid()
    if _status_fd is None or _status_fd[0] != pid:
        _status_fd = (pid, os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC))
    status = os.pread(_status_fd[1], _STATUS_BYTES, 0)
    anon, swap = status.find(b"\nRssAnon:"), status.find(b"\nVmSwap:")
    if anon < 0:
        raise OSError("/proc/self/status has no RssAnon: a kernel before 4.5, or not Linux's own /proc")
    kib = int(status[anon + 9 : status.index(b"kB", anon)])
    if swap >= 0:  # missing in kernels without swap
        kib += int(status[swap + 8 : status.index(b"kB", swap)])
    return kib << 10


@lru_cache(maxsize=1)
def _system_library() -> ctypes.CDLL:
    return ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)


def _darwin_rusage() -> tuple[int, ...]:
    words = (ctypes.c_uint64 * (_RUSAGE_BYTES // 8))()
    if _system_library().proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(words)) != 0:
        raise OSError(ctypes.get_errno(), "proc_pid_rusage failed")
    return tuple(words)[2:]


def _lifetime_peak_bytes() -> int:
    """The highest footprint that the system recorded; 0 if it records none (Linux)."""
    return _darwin_rusage()[_LIFETIME_MAX_FIELD] if sys.platform == "darwin" else 0


class PeakMeter:
    """The highest footprint, in bytes, while the context is open and, with `phase`, during each named phase.

        with PeakMeter() as meter:
            with meter.phase("forward"):
                ...
        meter.peak_bytes, meter.phases

    A daemon thread samples every 2 ms (less often if that would take over 1 % of a core, but at least every 6 ms); the
    start and end of a phase and every read of a property take a sample, too. `longest_gap_s` is the longest time
    between two samples, since a busy machine may delay the thread; any longer peak was seen. On Linux a peak within one
    call that holds the interpreter lock is missed; MLX's eval and numpy's loops release the lock. On macOS the peak of
    the whole run is the system's own lifetime maximum, which starts with the process and misses nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may sample while this thread does
        self._running = False
        self._thread: threading.Thread | None = None
        self._peak_bytes = 0
        self._lifetime_before_bytes = 0  # lifetime peaks up to this value do not count
        self._open_phases: list[list[int]] = []
        self._sampled_s: float | None = None  # when the last sample began
        self.longest_gap_s = 0.0
        self.phases: dict[str, int] = {}

    def __enter__(self) -> PeakMeter:
        if self._thread is not None:
            raise RuntimeError("this PeakMeter is already running")
        self._sampled_s, self.longest_gap_s = None, 0.0
        self._sample()
        self._running = True
        self._thread = threading.Thread(target=self._watch, name="footprint", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sample()
        thread, self._thread = self._thread, None
        self._running = False
        if thread is not None:
            thread.join()

    @property
    def peak_bytes(self) -> int:
        """The highest footprint since the start or the last `reset`, up to now or the end of the context."""
        if self._thread is not None:
            self._sample()
        return self._peak_bytes

    @property
    def now_bytes(self) -> int:
        """The current footprint."""
        return footprint_bytes()

    def reset(self) -> None:
        """Resets the peak (not the phases) to the current footprint."""
        with self._lock:
            self._lifetime_before_bytes = _lifetime_peak_bytes()
            self._peak_bytes = footprint_bytes()

    def mark(self) -> int:
        """Takes a sample and returns it, in bytes."""
        return self._sample()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records the highest footprint during the context as `phases[name]`; a repeated name keeps the maximum.

        Phases may nest; an outer phase includes the inner one's peak.
        """
        peak = [0]
        with self._lock:
            self._open_phases.append(peak)
        self._sample()
        try:
            yield
        finally:
            self._sample()
            with self._lock:
                self._open_phases = [other for other in self._open_phases if other is not peak]
                self.phases[name] = max(self.phases.get(name, 0), peak[0])

    def _sample(self) -> int:
        with self._lock:  # else a sample taken before a reset could be stored after it
            began_s = time.perf_counter()
            now = footprint_bytes()
            if self._sampled_s is not None:
                self.longest_gap_s = max(self.longest_gap_s, time.perf_counter() - self._sampled_s)
            self._sampled_s = began_s
            lifetime = _lifetime_peak_bytes()
            self._peak_bytes = max(self._peak_bytes, now, lifetime if lifetime > self._lifetime_before_bytes else 0)
            for peak in self._open_phases:
                peak[0] = max(peak[0], now)
        return now

    def _watch(self) -> None:
        interval_s = _INTERVAL_S
        while True:
            began_s = time.thread_time()
            for _ in range(_N_SAMPLES):
                time.sleep(interval_s)  # costs half as much as waiting for an Event
                if not self._running:
                    return
                self._sample()
            cost_s = (time.thread_time() - began_s) / _N_SAMPLES
            interval_s = min(max(_INTERVAL_S, cost_s / _MAX_LOAD), _MAX_INTERVAL_S)
