"""Device profiles (an app's memory on a phone, published rates), and this machine's thermal state.

The rates are estimates from public sources and are printed with every projection that uses them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phone:
    """A phone. bandwidth: bytes per second; flops: {item size in bytes: operations per second}; budget_bytes: an app's
    memory.
    """

    name: str
    chip: str
    bandwidth: float
    flops: dict[int, float]
    budget_bytes: int
    cache_bytes: int

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The assumptions, as sentences."""
        return (
            f"{self.chip}: {self.bandwidth / 1e9:.1f} GB/s, {self.flops[4] / 1e12:.2f} TFLOP/s in 32 bits and "
            f"{self.flops[2] / 1e12:.2f} in 16 bits, published estimates of peak rates",
            f"an app has {self.budget_bytes / 1e9:g} GB (the system does not report how much it grants)",
            "no wired memory, no thermal throttling, no waiting for flash",
        )


DEVICES = {
    "a17-pro": Phone("a17-pro", "A17 Pro (iPhone 15 Pro)", 51.2e9, {4: 2.15e12, 2: 4.3e12}, 1_000_000_000, 32 << 20),
}

THERMAL_STATES = ("nominal", "fair", "serious", "critical")
THROTTLED = THERMAL_STATES[2:]


def thermal_state(platform: str = sys.platform, load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """NSProcessInfo.thermalState through the Objective-C runtime (macOS 10.10.3 and later); None on other systems.

    The documented values are 0 to 3. The system throttles from `serious` on.
    """
    if platform != "darwin":
        return None
    try:
        load("/System/Library/Frameworks/Foundation.framework/Foundation")
        objc = load("/usr/lib/libobjc.A.dylib")
        objc.objc_getClass.restype = objc.sel_registerName.restype = ctypes.c_void_p
        objc.objc_getClass.argtypes = objc.sel_registerName.argtypes = [ctypes.c_char_p]
        send = objc.objc_msgSend
        send.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        send.restype = ctypes.c_void_p
        info = send(objc.objc_getClass(b"NSProcessInfo"), objc.sel_registerName(b"processInfo"))
        send.restype = ctypes.c_long
        return THERMAL_STATES[send(info, objc.sel_registerName(b"thermalState"))] if info else None
    except (OSError, AttributeError, IndexError):
        return None
