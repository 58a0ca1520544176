# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon does with the memory of its process; each in a process of its own."""

import platform
import subprocess
import sys

import pytest

GLIBC = """
import ctypes
from qmp_upm import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a o s hblks h u f ub fb k".split()]

libc.mallinfo2.restype = Heap
if {settle}:
    memory.settle()
libc.free(libc.malloc(8 << 20))
before = libc.mallinfo2().hblks
kept = libc.malloc(1 << 20)
print(libc.mallinfo2().hblks - before)
"""
CYCLES = """
import asyncio, gc, weakref
from qmp_upm import memory

class Node:
    pass

def leave(count):
    for _ in range(count):
        node = Node()
        node.itself = node
    return weakref.ref(node)

async def main():
    memory.settle()
    memory.COLLECT_SECONDS = 0.01
    left = leave(memory.NEW_OBJECTS // 4)
    print(left() is None)
    task = asyncio.create_task(memory.collect_regularly())
    while left() is not None:
        await asyncio.sleep(0.01)
    task.cancel()
    print(gc.get_freeze_count() > 10_000)
    first = leave(1)
    leave(memory.NEW_OBJECTS + 1)
    print(first() is None)

asyncio.run(main())
"""


def output(program: str) -> list[str]:
    """The words that it prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_large_blocks_stay_apart() -> None:
    """After a larger one was freed, a large block is still mapped by itself, and so given back."""
    assert output(GLIBC.format(settle=True)) == ["1"]
    assert output(GLIBC.format(settle=False)) == ["0"], "glibc no longer needs this"


def test_garbage_is_found_in_time() -> None:
    """Not while nothing is amiss, but regularly, and when there is much; imports are left out."""
    assert output(CYCLES) == ["False", "True", "True"]
