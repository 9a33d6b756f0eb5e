"""Bounds of memory that depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

FEATURES_SHARE, FEATURES_MOST = 32, 2**30

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container may use."""


def feature_bytes(memory: float) -> int:
    """Bytes of image features that a frozen vision tower's results take at most, kept from step to
    step, on a device of `memory` bytes.

    A thirty-second of the memory, and no more than 1 GiB. Beyond it features are computed again.
    """
    return int(min(FEATURES_MOST, memory // FEATURES_SHARE))


def host_memory() -> int:
    """Bytes of memory of this machine, or of this container where it may use less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in LIMITS:
        try:
            memory = min(memory, int(file.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return memory
