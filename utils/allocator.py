"""Whether the C allocator keeps the memory of freed tensors or gives it back to the system.

On a CPU every step allocates and frees the same memory again. glibc gives it back to the kernel,
which clears each page before it hands it out anew: tens of thousands of page faults a step, a tenth
of the time of many networks and half of that of the deepest. Here blocks of up to 32 MiB are kept.
Larger ones, of the wide networks, still come and go: they would leave holes that nothing else fits
into (densenet_bc_190_40 took five times the memory).
"""

import ctypes
import os

# Parameters of mallopt, from malloc.h: free memory at the end of the heap is never given back, it
# grows by 64 MiB, and larger blocks than 32 MiB, the most that glibc takes here, are no part of it.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEPING = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}

_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"
)  # fmt: skip


def keep_freed_memory() -> bool:
    """Have the allocator keep freed memory for the next tensors.

    Nothing happens where the user has chosen by one of glibc's variables (MALLOC_TRIM_THRESHOLD_
    and the like, GLIBC_TUNABLES), or where the C library is another.

    Returns:
        Whether the allocator has been told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    chosen = any(name in os.environ for name in _VARIABLES)
    if mallopt is None or chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return all(mallopt(*setting) for setting in _KEEPING.items())
