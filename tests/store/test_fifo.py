import asyncio
import heapq
import random

import numpy as np
import pytest

from megatron_opd.store.fifo import TrajectoryStore
from megatron_opd.types import Rollout, Segment, Trajectory


def trajectory(index, version=0):
    ids = np.zeros(1, np.int32)
    rollout = Rollout(
        index=index, prompt_ids=ids, response_ids=ids, segments=(Segment(first_token=0, version=version),), finish_reason="stop"
    )
    return Trajectory(rollout=rollout, teacher=None)


def now(coroutine):
    """The result of something that must not have to wait, or TimeoutError."""
    return asyncio.wait_for(coroutine, 0.001)


async def admit_all(store):
    admitted = []
    while True:
        try:
            admitted.append(await now(store.admit()))
        except TimeoutError:
            return admitted


def test_slots_are_charged_at_start_and_freed_when_their_version_is_published():
    async def play():
        store = TrajectoryStore(batch=2, max_lag=1)
        assert await admit_all(store) == [0, 1, 2, 3]
        for index in (3, 1, 0):
            await store.put(trajectory(index))
        assert [t.rollout.index for t in await now(store.take())] == [0, 1]
        assert await admit_all(store) == []  # taken is not yet published
        await store.release(1)
        assert await admit_all(store) == [4, 5]

    asyncio.run(play())


def test_batches_come_in_order_of_start_whatever_finishes_first():
    async def play():
        store = TrajectoryStore(batch=3, max_lag=2)
        order = await admit_all(store)
        random.Random(0).shuffle(order)
        for index in order:
            await store.put(trajectory(index))
        taken = [t.rollout.index for _ in range(3) for t in await now(store.take())]
        assert taken == list(range(9))

    asyncio.run(play())


def test_max_lag_zero_starts_nothing_while_a_batch_is_out():
    async def play():
        store = TrajectoryStore(batch=2, max_lag=0)
        assert await admit_all(store) == [0, 1]
        await store.put(trajectory(0))
        with pytest.raises(TimeoutError):
            await now(store.take())
        await store.put(trajectory(1))
        await now(store.take())
        assert await admit_all(store) == []
        await store.release(1)
        assert await admit_all(store) == [2, 3]

    asyncio.run(play())


def test_misuse_is_caught():
    async def play():
        store = TrajectoryStore(batch=1, max_lag=0)
        with pytest.raises(AssertionError, match="not in flight"):
            await store.put(trajectory(0))
        await store.admit()
        await store.put(trajectory(0))
        with pytest.raises(AssertionError, match="twice"):
            await store.put(trajectory(0))
        with pytest.raises(AssertionError, match="before it was trained"):
            await store.release(1)

    asyncio.run(play())


@pytest.mark.parametrize("max_lag", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_lag_never_exceeds_its_bound_under_adversarial_lengths(max_lag, seed):
    """A simulated clock: response times spread over four orders of magnitude, training faster or slower than rollout."""
    rng = random.Random(seed)
    batch, steps, train_s = 4, 30, rng.choice([0.1, 1.0, 10.0])

    async def play():
        store = TrajectoryStore(batch=batch, max_lag=max_lag)
        clock, version, trained, busy_until = 0.0, 0, 0, None
        running: list[tuple[float, int, int]] = []  # (finish, index, version at start)
        started_at: dict[int, int] = {}
        worst = 0
        while trained < steps:
            for index in await admit_all(store):
                started_at[index] = version
                heapq.heappush(running, (clock + 10 ** rng.uniform(-2, 2), index, version))
            if busy_until is None:
                try:
                    taken = await now(store.take())
                    worst = max([worst, *(trained - started_at[t.rollout.index] for t in taken)])
                    busy_until = clock + train_s
                except TimeoutError:
                    pass
            if busy_until is not None and (not running or busy_until <= running[0][0]):
                clock, busy_until = busy_until, None
                trained += 1
                version = trained
                await store.release(version)
            else:
                clock, index, _ = heapq.heappop(running)
                await store.put(trajectory(index))
        return worst

    worst = asyncio.run(play())
    assert worst <= max_lag
    assert worst == max_lag or train_s < 10  # a slow learner uses the whole bound


def test_past_its_bytes_only_prompts_of_the_next_batch_start_and_nothing_is_stuck():
    async def play():
        store = TrajectoryStore(batch=2, max_lag=2, most_bytes=20)  # a trajectory here has 8 bytes
        assert [await now(store.admit()) for _ in range(6)] == [*range(6)], "what has not finished has no size yet"
        for index in range(2, 6):
            await store.put(trajectory(index))
        for index in (0, 1):
            await store.put(trajectory(index))
        await store.take()
        await store.release(1)
        assert await admit_all(store) == []  # 32 bytes wait, and the next batch has started long ago
        await store.take()
        await store.release(2)
        assert await admit_all(store) == [6, 7, 8, 9]  # 16 bytes

        tight = TrajectoryStore(batch=2, max_lag=2, most_bytes=1)
        assert await now(tight.admit()) == 0
        await tight.put(trajectory(0))
        assert await admit_all(tight) == [1]  # it completes the next batch; more would not fit
        await tight.put(trajectory(1))
        assert len(await now(tight.take())) == 2

    asyncio.run(play())


def test_a_batch_comes_without_what_was_skipped_and_a_store_may_begin_anywhere():
    async def play():
        store = TrajectoryStore(batch=3, max_lag=0, version=5)
        assert await admit_all(store) == [15, 16, 17]
        for index in (15, 17):
            await store.put(trajectory(index))
        await store.skip(16)
        assert [t.rollout.index for t in await now(store.take())] == [15, 17]
        with pytest.raises(AssertionError, match="before it was trained"):
            await store.release(7)
        await store.release(6)
        assert await admit_all(store) == [18, 19, 20]

    asyncio.run(play())
