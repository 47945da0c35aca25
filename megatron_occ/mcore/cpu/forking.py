"""Large tensors that a forked child does not get.

After a fork, parent and child share their pages, and the first of them to write to a page copies
it, a few microseconds each. An update of the parent writes to its whole model, so that the first
one after a fork took 1.6 times as long as others. It is cheaper to copy what the child needs before
the fork and to keep the rest from it (Linux: madvise(2), MADV_DONTFORK).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

_HUGE = 2**21  # bytes of a page
_DONT_FORK, _DO_FORK = 10, 11  # of <sys/mman.h>


class Region(NamedTuple):
    """Memory of a storage, in bytes."""

    address: int
    size: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Region:
        """Where a tensor's storage lies."""
        storage = tensor.untyped_storage()
        return cls(storage.data_ptr(), storage.nbytes())

    def inner_pages(self) -> Region:
        """Whole pages, less one at either end: the allocator keeps its notes beside a storage."""
        page = mmap.PAGESIZE
        begin = -(-self.address // page) * page + page
        end = (self.address + self.size) // page * page - page
        return Region(begin, max(0, end - begin))


def regions(tensors: Iterable[torch.Tensor]) -> set[Region]:
    """Storages of those tensors that lie in the memory of the host."""
    return {Region.of(tensor) for tensor in tensors if tensor.is_cpu}


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on huge pages, where the system has them: of 512 times fewer pages to ask for."""
    size = tensor.numel() * tensor.element_size()
    if sys.platform != "linux" or size < _HUGE:
        return tensor.clone()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


@contextlib.contextmanager
def not_inherited(owned: Iterable[Region]) -> Iterator[None]:
    """A process forked within the block lacks this memory: to read it there ends that process."""
    pages = [region.inner_pages() for region in owned] if sys.platform == "linux" else []
    pages = [each for each in pages if each.size]
    if pages:
        _return_free_memory()
    try:
        _advise(pages, _DONT_FORK)
        yield
    finally:
        _advise(pages, _DO_FORK)


def _advise(pages: Iterable[Region], advice: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for region in pages:
        call(region.address, region.size, advice)


def _return_free_memory() -> None:
    """To the kernel: an empty page is cheaper to get than the copy of one that holds nothing."""
    with contextlib.suppress(AttributeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)
