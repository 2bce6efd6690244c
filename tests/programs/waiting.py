"""How much time torch's other threads burn while one works alone beside a busy process: seconds,
printed.
"""

import subprocess
import sys
import time

import torch

if sys.argv[1] == "irann":
    import irann  # noqa: F401

busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    torch.set_num_threads(2)
    x = torch.zeros(1 << 17)
    x.add_(1)
    if sys.argv[1] == "irann":
        time.sleep(1.2)  # it looks twice a second
    others = time.process_time() - time.thread_time()
    for _ in range(100):
        x.add_(1)  # both threads
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:  # one alone
            pass
    print(time.process_time() - time.thread_time() - others)
finally:
    busy.kill()
