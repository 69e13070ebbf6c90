"""Read before torch is imported, by the tests and by the processes that they start."""

import os

# Threads of processes that share two cores wait for each other: twice the CPU time for a model.
os.environ.setdefault("OMP_NUM_THREADS", "1")
