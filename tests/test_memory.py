"""Bytes that a process holds, as the system counts them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from opd.memory import peak_resident, return_freed_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="counted by /proc")
MB = 2**20


@linux
def test_a_large_parent_does_not_count():
    """ru_maxrss, which is what others read, counts it."""
    held = np.ones(300 * MB, np.uint8)
    code = (
        "import resource; from opd.memory import peak_resident as peak;"
        " print(peak(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, usual = map(int, run.stdout.split())
    assert held.nbytes < peak_resident()
    assert 5 * MB < ours < 200 * MB < usual


@linux
def test_a_peak_is_forgotten():
    """In a process of its own, in which nothing else has had a peak."""
    code = """
import numpy as np
from opd.memory import forget_peak_resident, peak_resident
held = np.ones(200 * 2**20, np.uint8)
print(peak_resident())
del held
print(peak_resident())
forget_peak_resident()
print(peak_resident())
held = np.ones(150 * 2**20, np.uint8)
print(peak_resident())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, freed, after, again = (int(line) / MB for line in run.stdout.split())
    assert freed > before - 1 > 200  # the system counts pages of each processor now and then
    assert after < before - 150
    assert after + 100 < again < before


@linux
def test_freed_blocks_are_returned():
    """Without it glibc keeps freed blocks for later as long as any above them is in use."""
    code = """
import sys, numpy as np
from opd.memory import forget_peak_resident, peak_resident, return_freed_memory
if sys.argv[1] == "returned":
    return_freed_memory()
np.ones(24 * 2**20, np.uint8)  # after which glibc takes blocks of this size from its heap
blocks = [np.ones(8 * 2**20, np.uint8) for _ in range(30)]
blocks[:-1] = []
forget_peak_resident()
print(peak_resident())
"""
    held = {}
    for way in ("kept", "returned"):
        run = subprocess.run(
            [sys.executable, "-c", code, way], capture_output=True, text=True, check=True
        )
        held[way] = int(run.stdout)
    assert held["returned"] < held["kept"] - 100 * MB
    return_freed_memory()  # does nothing that anybody would notice
