"""The store that bounds staleness. It knows slots, order and versions; nothing of models, roles or tokens.

Slot i is charged when prompt i starts and freed when the weights of its own training step are published. With
(max_lag + 1) * batch slots, a prompt of step s starts only once version s - max_lag is published, so no token that
step s trains on is older than max_lag optimizer steps: a hard bound whatever the lengths. Ordering by completion
instead would let stragglers overrun it. A prompt that is set aside keeps its place in the order: its step has one less.
"""

import asyncio
import math

import numpy as np

from megatron_opd.types import Trajectory


class TrajectoryStore:
    """`admit` waits for a free slot, `take` and `finished` for trajectories; `release` wakes the first, `put` the others."""

    def __init__(self, *, batch: int, max_lag: int, version: int = 0, most_bytes: float = math.inf) -> None:
        """Starts behind the prompts of `version` steps. Past `most_bytes` only prompts of the next batch may start."""
        self._batch = batch
        self._slots = (max_lag + 1) * batch
        self._most_bytes = most_bytes
        self._started = self._taken = self._released = version * batch
        self._finished: dict[int, Trajectory | None] = {}
        self._bytes = 0
        self._changed = asyncio.Condition()

    async def admit(self) -> int:
        """The index of the next prompt, as soon as it may start."""
        async with self._changed:
            await self._changed.wait_for(self._may_start)
            self._started += 1
            return self._started - 1

    async def put(self, trajectory: Trajectory) -> None:
        """Stores a finished trajectory under its prompt's index."""
        await self._finish(trajectory.rollout.index, trajectory)

    async def skip(self, index: int) -> None:
        """Says that nothing will come of a prompt."""
        await self._finish(index, None)

    async def _finish(self, index: int, trajectory: Trajectory | None) -> None:
        assert self._taken <= index < self._started, f"trajectory {index} is not in flight ({self._taken} to {self._started - 1} are)"
        assert index not in self._finished, f"trajectory {index} was stored twice"
        async with self._changed:
            self._finished[index] = trajectory
            self._bytes += _size(trajectory)
            self._changed.notify_all()

    async def take(self) -> tuple[Trajectory, ...]:
        """The next batch in order of start, once all of it has finished; without those that were skipped."""
        wanted = range(self._taken, self._taken + self._batch)
        async with self._changed:
            await self._changed.wait_for(lambda: all(index in self._finished for index in wanted))
            self._taken += self._batch
            batch = tuple(trajectory for index in wanted if (trajectory := self._finished.pop(index)) is not None)
            self._bytes -= sum(map(_size, batch))
            return batch

    async def finished(self, end: int) -> None:
        """Waits until every prompt before index `end` has finished; they must have been admitted, or be about to be."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._taken + len(self._finished) >= end)

    async def release(self, version: int) -> None:
        """Frees the slots that led to `version`, which every rollout replica now samples from."""
        assert self._released <= version * self._batch <= self._taken, f"version {version} is published before it was trained"
        async with self._changed:
            self._released = version * self._batch
            self._changed.notify_all()

    def _may_start(self) -> bool:
        next_batch = self._started < self._taken + self._batch  # never refused for want of room, or nothing would be freed again
        return self._started < self._released + self._slots and (next_batch or self._bytes <= self._most_bytes)


def _size(trajectory: Trajectory | None) -> int:
    """Bytes of its arrays."""
    if trajectory is None:
        return 0
    parts = (trajectory.rollout, trajectory.teacher)
    values = [getattr(part, name) for part in parts if part is not None for name in part.__slots__]
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))
