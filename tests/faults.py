"""A run in which one rank fails on purpose: `torchrun faults.py KIND STEP config.yaml`; rank 1 fails in
that step, in the first attempt only."""
import os
import re
import signal
import sys
import time

from mistral_nb.train import dist, faults, loop
from mistral_nb.train.__main__ import main

KINDS = {
    "raises": lambda: [][1],
    "hangs": lambda: time.sleep(600),
    "hangs natively": lambda: re.fullmatch("(a+)+", "a" * 60 + "b"),  # never lets another thread run
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": lambda: (_ for _ in ()).throw(
        loop.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")
    ),
}


def broken(real, kind: str, at: int):
    "`train_step` that fails in the step `at`"
    done = [0]

    def step(*args, **kw):
        done[0] += 1
        if done[0] == at and os.environ["RANK"] == "1" and not dist.was_restarted(): KINDS[kind]()
        return real(*args, **kw)
    return step


if __name__ == "__main__":
    loop.train_step = broken(loop.train_step, sys.argv[1], int(sys.argv[2]))
    faults.exit_process(main(sys.argv[3:]))
