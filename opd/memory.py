"""Memory budgets that depend on the machine."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

FEATURES_SHARE, FEATURES_MOST = 32, 2**30
"""The feature cache takes a 32nd of the device's memory, and at most 1 GiB."""

ACTIVATION_BYTES = 2**31
"""Bytes of activations that a backward may hold without recomputing any layer, where a recipe does
not say another bound (`model.recompute_above`)."""

PREFILL_TOKENS = 16384
"""Padded prompt tokens that a rollout runs together."""

CHUNK_BYTES = 2**26
"""Bytes of one float32 array [rows, vocabulary] while logits of both policies are compared."""

M_MMAP_THRESHOLD = -3
"""The number of the parameter in glibc's malloc.h."""

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files in which Linux says how many bytes of memory a container may use."""


def feature_bytes(memory: float) -> int:
    """Largest size in bytes of the feature cache of a frozen vision tower, on a device of `memory`
    bytes.

    The cache keeps image features from step to step. Features that do not fit are recomputed.
    """
    return int(min(FEATURES_MOST, memory // FEATURES_SHARE))


def host_memory(limits: Iterable[Path] = LIMITS) -> int:
    """Bytes of memory that this process may use: the machine's, or the container's where it is
    less. `limits`: files that say how much the container may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in limits:
        try:
            memory = min(memory, int(file.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return memory


def peak_resident() -> int:
    """Most bytes that this process has held in memory, since it began or they were forgotten."""
    with suppress(OSError, StopIteration):  # not on Linux
        # There ru_maxrss is no less than what the parent held when it started this process.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def forget_peak_resident() -> None:
    """Makes Linux count `peak_resident` from now on; elsewhere nothing happens."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def return_freed_memory() -> None:
    """Makes glibc return freed blocks of 128 KiB and more to the system at once, so that resident
    bytes are bytes in use; elsewhere nothing happens."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
