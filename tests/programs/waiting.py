"""How much time torch's other threads burn while one works alone: seconds, printed."""

import sys
import time

import torch

if sys.argv[1] == "irann":
    import irann  # noqa: F401

torch.set_num_threads(2)
x = torch.zeros(1 << 17)
for _ in range(20):
    x.add_(1)
others = time.process_time() - time.thread_time()
for _ in range(200):
    x.add_(1)  # both threads
    end = time.thread_time() + 2e-3
    while time.thread_time() < end:  # one alone
        pass
print(time.process_time() - time.thread_time() - others)
