"""What a role's process does to itself before it works: its cores, its threads, its end with its parent."""

import ctypes
import os
import signal

import torch

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, however it dies: no orphan outlives a launcher."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def pin(cores: tuple[int, ...]) -> None:
    """Binds this process and its future children to CPU cores, with one torch thread each; () leaves the cores alone."""
    if cores:
        os.sched_setaffinity(0, set(cores) & os.sched_getaffinity(0) or set(cores))
        torch.set_num_threads(len(cores))
