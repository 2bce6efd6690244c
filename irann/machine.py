"""Two cores are rarely idle: let torch's threads wait for each other without keeping the cores from others.

torch computes with OpenMP's threads. Between two pieces of work they wait by spinning, some 300,000 times around a
loop, before they go to sleep. Where anything else runs, the thread that the others wait for is not running, and they
burn its time: on two cores beside one busy process, a small training has taken fifty times as long. GNU's OpenMP library spins
300 times less once it manages more threads than there are cores. A second pool of threads that sleeps for ever
makes it so, whichever of torch and irann was imported first; an environment variable would come too late.
"""

import os
import sys
import threading

import torch

MOST_CORES = 8  # beyond, waking the sleepers may cost more than spinning saves
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a reader who sets one of these decides for himself


def cores() -> int:
    """-> how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def waits_politely() -> bool:
    """-> whether `share_cores` has work to do on this machine."""
    chosen = any(name in os.environ for name in CHOSEN)
    return sys.platform == "linux" and 1 < torch.get_num_threads() <= MOST_CORES and not chosen


def share_cores() -> None:
    """Start the second pool, once in a process. Nothing is computed differently."""
    if waits_politely() and not any(t.name == _hold.__name__ for t in threading.enumerate()):
        started = threading.Event()
        threading.Thread(target=_hold, args=(started,), name=_hold.__name__, daemon=True).start()
        started.wait()


def _hold(started: threading.Event) -> None:
    torch.zeros(MOST_CORES << 16).add_(1)  # enough for every thread: the pool now exists
    started.set()
    threading.Event().wait()
