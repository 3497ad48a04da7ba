"""The scripted backend keeps the contract of `types.Rollout` and the versions of a real transport."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_opd.errors import PeerError
from megatron_opd.rollout.scripted import ScriptedRollout, ScriptedSettings
from megatron_opd.teacher.scripted import ScriptedTeacher
from megatron_opd.types import JoinTransport, Needs, Prompt, Segment, TensorSpec
from megatron_opd.weights.transport import BroadcastSender

NEEDS = Needs(behaviour_logp=True, head=4, draws=3, teacher_token=True, teacher_head=True, teacher_draws=True, teacher_top=5)


def settings(**changes):
    return ScriptedSettings(**{"needs": NEEDS, "vocab_size": 37, "max_response_tokens": 12, "end_id": 1, "version": 4} | changes)


def prompt(index):
    return Prompt(index=index, token_ids=np.array([2, 3], dtype=np.int32))


def test_a_response_depends_on_seed_and_index_alone():
    async def together():
        backend = ScriptedRollout(settings())
        return await asyncio.gather(*(backend.generate(prompt(i)) for i in range(20)))

    async def backwards():
        backend = ScriptedRollout(settings())
        return [await backend.generate(prompt(i)) for i in reversed(range(20))][::-1]

    first, second = asyncio.run(together()), asyncio.run(backwards())
    assert len({len(r.response_ids) for r in first}) > 3
    for a, b in zip(first, second):
        assert np.array_equal(a.response_ids, b.response_ids) and np.array_equal(a.draw_ids, b.draw_ids)
        assert a.segments == (Segment(first_token=0, version=4),)
        assert (a.finish_reason == "stop") == (len(a.response_ids) < 12)
        rows = np.repeat(np.arange(len(a.response_ids)), a.draw_sizes)
        assert not (a.draw_ids[:, None] == a.head_ids[rows]).any() and (np.bincount(rows, a.draw_counts) == NEEDS.draws).all()
        assert (np.diff(a.head_logp) <= 0).all()


def test_segments_switch_at_an_update_from_a_real_transport():
    manifest = (TensorSpec(name="w", dtype="float32", shape=(3,)),)
    sender = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=64, timeout_s=10)

    async def run():
        backend = ScriptedRollout(settings(token_s=0.01, length=lambda index: 100, timeout_s=10))
        await backend.join_transport(JoinTransport(address=sender.listen(1), first_rank=1, world_size=2))
        task = asyncio.create_task(backend.generate(prompt(0)))
        await asyncio.sleep(0.05)
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(sender.send, 5, manifest, [("w", torch.ones(3))])
            seconds = await backend.receive_weights(5)
            sent.result()
        result = await task
        await backend.close()
        return result, seconds

    rollout, seconds = asyncio.run(run())
    assert [s.version for s in rollout.segments] == [4, 5] and 0 < rollout.segments[1].first_token < 12
    assert set(seconds) == {"pause", "receive", "swap", "resume"}


def test_closing_ends_what_runs():
    async def run():
        backend = ScriptedRollout(settings(token_s=0.05, length=lambda index: 100))
        task = asyncio.create_task(backend.generate(prompt(7)))
        await asyncio.sleep(0.01)
        await backend.close()
        await task

    with pytest.raises(PeerError, match="prompt 7"):
        asyncio.run(run())


def test_the_scripted_teacher_reports_one_true_distribution():
    rollout = asyncio.run(ScriptedRollout(settings()).generate(prompt(0)))
    teacher = ScriptedTeacher(needs=NEEDS, vocab_size=37)
    (scores,) = teacher.score([rollout])
    q = dict(zip(*(x.ravel().tolist() for x in (np.arange(37), teacher._logp_V))))
    assert abs(sum(np.exp(list(q.values()))) - 1) < 1e-5
    for ids, logp in (
        (rollout.response_ids, scores.token_logp),
        (rollout.head_ids, scores.head_logp),
        (rollout.draw_ids, scores.draw_logp),
        (scores.top_ids, scores.top_logp),
    ):
        assert logp.shape == ids.shape and [q[i] for i in ids.ravel().tolist()] == logp.ravel().tolist()
