"""Support code: nobody needs this directory to understand DAPO.

GNU OpenMP's threads, torch's on a CPU, wait in a spinning loop. With other processes busy on the
same cores, a step then takes up to 30 times as long; with this limit, 5 times, at no cost on idle
cores. OpenMP reads it when it is loaded, so this package must be imported before torch.
"""

import gc
import os

GC_THRESHOLD = gc.get_threshold()
gc.set_threshold(100_000)  # collecting takes a sixth of the imports' time; `setup` puts it back
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
