"""Whether the C allocator keeps the memory of freed tensors or gives it back to the system.

On a CPU every step allocates and frees the same memory again. glibc gives what is free at the end
of its heap back to the kernel, which clears each page before it hands it out anew: up to 50,000
page faults a step. Here the heap is retained. Blocks above 32 MiB, of the wide networks, are no
part of it and still come and go, because inside it they would leave holes that nothing else fits
into (densenet_bc_190_40 took three times the memory).
"""

import ctypes
import os

# Parameters of mallopt, from malloc.h: free memory at the end of the heap is never given back, the
# heap grows by 64 MiB, and blocks above 32 MiB, the most that glibc takes here, are no part of it.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}

_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"
)  # fmt: skip


def retain_freed_memory() -> bool:
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
    return all(mallopt(*setting) for setting in _SETTINGS.items())
