"""What carries the algorithm: nobody needs this directory to understand DAPO.

What is set here must be set before torch is imported, so this package must be imported before it.
GNU OpenMP's threads, torch's on a CPU, wait in a spinning loop. With other processes busy on the
same cores, a step then takes up to 30 times as long; with a limit, 3 times, at no cost on idle
cores. GNU's malloc gives a large tensor's memory back to the system when it is freed, and the
kernel clears it for the next one; kept, a step on a CPU takes 7% less processor time.
"""

import ctypes
import gc
import os

GC_THRESHOLD = gc.get_threshold()
gc.set_threshold(100_000)  # collecting takes a sixth of the imports' time; `setup` puts it back
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
libc = ctypes.CDLL(None) if os.name == "posix" else None
if hasattr(libc, "mallopt"):
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(option, 2**30)  # bytes
