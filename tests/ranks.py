"""Runs a function on n gloo ranks, each a process of its own, and returns what every rank returned."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`function(*args)` on every rank of a default gloo group. It must be importable; results are tensors, numbers, strings, lists, dicts.

    Raises:
        AssertionError: a rank raised (with its traceback) or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=_rank, args=(function, rank, world_size, folder, args, timeout_s)) for rank in range(world_size)]
        for worker in workers:
            worker.start()
        try:
            _wait(workers, folder, timeout_s)
            return [torch.load(Path(folder) / f"result{rank}", weights_only=True) for rank in range(world_size)]
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()


def _wait(workers: list, folder: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(worker.is_alive() for worker in workers):
        failed = next((rank for rank, worker in enumerate(workers) if worker.exitcode not in (None, 0)), None)
        assert failed is None, _failure(folder, failed)
        assert time.monotonic() < deadline, f"ranks {[r for r, w in enumerate(workers) if w.is_alive()]} did not end within {timeout_s} s"
        time.sleep(0.02)
    for rank, worker in enumerate(workers):
        assert worker.exitcode == 0, _failure(folder, rank)


def _failure(folder: str, rank: int) -> str:
    report = Path(folder) / f"error{rank}"
    return f"rank {rank} failed:\n{report.read_text() if report.exists() else 'no traceback'}"


def _rank(function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple, timeout_s: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    try:
        torch.save(function(*args), Path(folder) / f"result{rank}")
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()
