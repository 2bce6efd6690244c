"""How torch's threads wait on a machine that is not idle (OpenMP's wait policy), how many a piece
of work is worth, how a lack of memory is told, where the cache is, and how a file is written whole
or not at all.

torch computes with OpenMP's threads. Between two pieces of work they wait by spinning, some 300,000
times around a loop, before they go to sleep. On an idle machine nothing is faster. Where anything
else runs, the thread that the others wait for may not be running, and they burn its time: on two
cores beside one busy process, a small training has taken fifty times as long. GNU's OpenMP library
spins 300 times less while it manages more threads than there are cores. So a watcher looks twice a
second at how much others compute, and as long as they do it keeps a second pool of threads, which
sleeps. That works whichever of torch and irann was imported first; an environment variable would
come too late, and could not change its mind. What is too small to be shared is computed by one
thread, which waits for nobody.
"""

import atexit
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MOST_CORES = 8  # beyond, waking the sleepers may cost more than spinning saves
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a reader who sets one of these decides for himself
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # likewise
SMALL = 3e7  # parameters times characters: below, two threads are no faster than one
PERIOD = 0.5  # seconds between two looks
BUSY = 0.25  # cores: others compute
QUIET = 4  # looks without others until the pool is let go
STAT = Path("/proc/stat")


def cores() -> int:
    """-> how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def waits_politely() -> bool:
    """-> whether `share_cores` has work to do on this machine."""
    chosen = any(name in os.environ for name in CHOSEN)
    linux = sys.platform == "linux" and STAT.is_file()
    return linux and 1 < torch.get_num_threads() <= MOST_CORES and not chosen


def share_cores() -> None:
    """Start the watcher, once in a process. Nothing is computed differently."""
    if waits_politely() and not any(t.name == _watch.__name__ for t in threading.enumerate()):
        over = threading.Event()
        args = (over, torch.get_num_threads())
        watcher = threading.Thread(target=_watch, name=_watch.__name__, args=args, daemon=True)
        watcher.start()
        atexit.register(_end, over, watcher)


def _end(over: threading.Event, watcher: threading.Thread) -> None:
    """No thread of ours is in torch when Python ends: it could not come back from there."""
    over.set()
    watcher.join(timeout=5)


@contextmanager
def threads_for(work: float) -> Iterator[None]:
    """As many threads inside the block as `work` (parameters x characters) is worth: one or all."""
    threads = torch.get_num_threads()
    alone = threads == 1 or threads > MOST_CORES  # a large machine is left as it is
    if alone or work > SMALL or any(name in os.environ for name in (*CHOSEN, *THREADS)):
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


class SecondPool:
    """A pool of OpenMP's threads that does nothing; while it is there, all others wait politely."""

    def __init__(self, threads: int) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._hold, args=(threads,), daemon=True)
        self.thread.start()

    def _hold(self, threads: int) -> None:
        torch.set_num_threads(threads)  # this thread's: another one may be in `threads_for`
        torch.zeros(MOST_CORES << 16).add_(1)  # enough for every thread: the pool now exists
        self.over.wait()

    def release(self) -> None:
        self.over.set()
        self.thread.join(timeout=5)


def _watch(over: threading.Event, threads: int) -> None:
    pool = SecondPool(threads) if os.getloadavg()[0] > 0.7 * cores() else None
    quiet = 0
    wall, busy = _clocks()
    while not over.wait(PERIOD):
        wall_now, busy_now = _clocks()
        others = (busy_now - busy) / (wall_now - wall)
        wall, busy = wall_now, busy_now
        quiet = quiet + 1 if others < BUSY else 0
        if pool is None and not quiet:
            pool = SecondPool(threads)
        elif pool is not None and quiet >= QUIET:
            pool.release()
            pool = None
    if pool is not None:
        pool.release()


def _clocks() -> tuple[float, float]:
    """-> seconds on the wall, and seconds that others have computed on all cores."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().split()[1:11])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy - time.process_time()


def lacks_memory(error: Exception) -> bool:
    """-> whether torch says that a CPU or a GPU has no memory left for something."""
    words = str(error)
    return "out of memory" in words or ("allocate" in words and "memory" in words)


def cache() -> Path:
    """-> the user's cache folder: IRANN_CACHE, or irann under XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("IRANN_CACHE"):
        return Path(given).absolute()  # of a library, a bare name is looked for elsewhere
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "irann"


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path` and rename: whoever looks sees the old file or the whole new one. Raises
    OSError that names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with open(aside, "xb") as file:  # to be read by whom the umask lets
            file.write(data)
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
