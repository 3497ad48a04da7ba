"""What a role's process does to itself before it works: its cores, its threads, its end with its parent."""

import ctypes
import os
import signal

import torch

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, however it dies: no orphan outlives a launcher.

    `parent` is the process id that the parent gave; if it is gone already, this process ends here.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def pin(cores: tuple[int, ...]) -> None:
    """Binds this process and its future children to CPU cores, with one torch thread each; () leaves the cores alone.

    Cores are counted among those that the process may use, and from the first again where there are fewer.
    """
    if cores:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)] for core in cores})
        torch.set_num_threads(len(cores))
