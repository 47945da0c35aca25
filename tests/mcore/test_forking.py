"""Memory that a forked child does not get, and that its parent need not copy."""

from __future__ import annotations

import faulthandler
import mmap
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from megatron_occ.mcore.cpu.forking import Region, copied, not_inherited, regions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) of Linux")
SIZE = 2**24


def forked(work) -> int:
    """A child that does ``work``; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        faulthandler.disable()  # some are meant to fault
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("hidden", [True, False])
def test_a_parent_copies_no_page_of_what_its_child_does_not_get(hidden):
    tensor = torch.ones(SIZE // 4)
    block = not_inherited(regions([tensor])) if hidden else nullcontext()
    with block:
        child = forked(lambda: time.sleep(30) or 0)
    before = faults()
    tensor.add_(1)
    taken = faults() - before
    os.kill(child, signal.SIGKILL)
    wait(child)
    pages = SIZE // mmap.PAGESIZE
    assert taken < pages / 10 if hidden else taken >= pages / 2
    assert bool((tensor == 2).all())


def test_a_child_reads_the_copy_and_not_what_was_kept_from_it():
    tensor = torch.arange(SIZE // 4).view(2, -1)
    copy = copied(tensor)
    with not_inherited(regions([tensor])):
        reads_copy = forked(lambda: 0 if int(copy[1, -1]) == SIZE // 4 - 1 else 1)
        reads_tensor = forked(lambda: int(tensor[1, 0]) * 0)
    tensor.zero_()
    assert wait(reads_copy) == 0
    assert wait(reads_tensor) == -signal.SIGSEGV
    # given back: the next child has it
    assert wait(forked(lambda: int(tensor[1, 0]))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("rows", [1, 2**22])
def test_copies_hold_what_they_were_made_of(dtype, rows):
    tensor = torch.randint(0, 100, (3, rows)).to(dtype)
    for each in (tensor, tensor.T):
        copy = copied(each)
        assert copy.dtype == dtype
        assert torch.equal(copy, each)
        assert Region.of(copy) != Region.of(each)


def test_the_ends_of_a_storage_stay_shared():
    page = mmap.PAGESIZE
    assert Region(page + 1, 10 * page).inner_pages() == Region(3 * page, 7 * page)
    assert Region(page, page).inner_pages().size == 0
    assert regions([torch.empty(0, device="meta")]) == set()
