"""Work on pieces of a weight side by side, each piece on one thread.

torch splits every single operation among its threads and joins them again by spinning. For operations of a fraction of a
millisecond that is lost time when any other process wants a core: on a busy machine two threads took 20 times the
processor time of one. Whole pieces side by side meet only at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def pieces(length: int, size: int) -> Iterator[slice]:
    """`range(length)` in slices of `size`, at least 1; the last may be shorter."""
    size = max(1, size)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def for_each(work: Callable[[slice], None], length: int, size: int) -> None:
    """Call `work` with each of `pieces(length, size)`, on as many threads as torch has. Raises what `work` raises.

    How the work is cut does not depend on the number of threads, so that results do not either. Meanwhile torch's own
    threads are set to one for the whole process.
    """
    slices = list(pieces(length, size))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or len(slices) == 1:
            for part in slices:
                work(part)
        else:
            with ThreadPoolExecutor(min(threads, len(slices)), "quantize") as pool:
                # reading the results raises the first error
                for _ in pool.map(work, slices):
                    pass
    finally:
        torch.set_num_threads(threads)
