"""What carries the algorithm: nobody needs this directory to understand DAPO.

It must be imported before torch. GNU OpenMP's threads, torch's on a CPU, wait in a spinning loop:
with other processes busy on the same cores, a step then takes up to 30 times as long; with this
limit, 3 times, at no cost on idle cores. GNU's malloc returns the memory of a freed tensor to the
system, which clears it for the next one: without that, a step takes 7% less processor time.
"""

import ctypes
import gc
import os

GC_THRESHOLD = gc.get_threshold()
gc.set_threshold(100_000)  # collecting takes a sixth of the imports' time; `setup` puts it back
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
libc = ctypes.CDLL(None) if os.name == "posix" else None
for option in (-1, -3) if hasattr(libc, "mallopt") else ():  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    libc.mallopt(option, 2**30)  # bytes
