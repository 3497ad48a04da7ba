"""A real vLLM engine: what it reports equals a plain forward pass, before, during and after weight updates."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_opd import roles
from megatron_opd.config import RolloutConfig, load
from megatron_opd.errors import ConfigError, PeerError, WeightSyncError
from megatron_opd.placement import Process
from megatron_opd.rollout.engine import EngineSettings, VLLMRollout
from megatron_opd.runtime import rpc
from megatron_opd.types import Done, Generate, JoinTransport, Needs, Prompt, Segment, Stop, TensorSpec
from megatron_opd.weights import transport
from megatron_opd.weights.transport import BroadcastSender
from tests.rollout.models import END, VOCAB, forward_logp, save_experts, save_model

pytestmark = pytest.mark.engines
EVERYTHING = Needs(behaviour_logp=True, head=4, draws=3)


class Lab:
    """One engine, the sender of its weights, and an event loop that lives as long as they do."""

    def __init__(self, path, *, temperature, needs, keep_kv=False, timeout_s=20.0):
        self.runner = asyncio.Runner()
        rollout = RolloutConfig(
            dtype="float32", temperature=temperature, max_response_tokens=120, max_running=16, kv_cache_bytes=32 << 20, keep_kv=keep_kv
        )
        settings = EngineSettings(rollout=rollout, path=path, needs=needs, max_model_len=512, timeout_s=timeout_s, seed=1)
        self.engine = self.runner.run(VLLMRollout.start(settings))
        self.connect(timeout_s)
        self.pool = ThreadPoolExecutor(1)
        self.pid = int(self.engine._name.split("pid ")[1].rstrip(")"))

    def connect(self, timeout_s):
        """A new sender, which the engine joins."""
        self.sender = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=1 << 16, timeout_s=timeout_s)
        address = self.sender.listen(1)
        self.runner.run(self.engine.join_transport(JoinTransport(address=address, first_rank=1, world_size=2)))

    async def update(self, version, path, change=dict):
        """`change` makes of the stored tensors those that are sent."""
        tensors = change(load_file(Path(path) / "model.safetensors"))
        manifest = tuple(TensorSpec(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape)) for n, t in tensors.items())
        self.sent = self.pool.submit(self.sender.send, version, manifest, list(tensors.items()))
        seconds = await self.engine.receive_weights(version)
        self.sent.result()
        return seconds

    def rollouts(self, prompts, *, update=None, after_s=0.2):
        """All responses; `update` (version, path) arrives while they are being drawn."""

        async def run():
            tasks = [asyncio.create_task(self.engine.generate(p)) for p in prompts]
            if update:
                await asyncio.sleep(after_s)
                await self.update(*update)
            return await asyncio.gather(*tasks)

        return self.runner.run(run())

    def close(self):
        self.runner.run(self.engine.close())
        self.sender.close()
        self.pool.shutdown()
        self.runner.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, seed, tied="tied" in name) for seed, name in enumerate(["old", "new", "tied_old", "tied_new"])}


@pytest.fixture(scope="module")
def lab(models, engine_environment):
    lab = Lab(models["old"], temperature=0.7, needs=EVERYTHING)
    yield lab
    lab.close()


def test_experts_follow_an_update(tmp_path, engine_environment):
    """vLLM's own reload leaves packed experts as they were."""
    paths = {version: save_experts(tmp_path / str(version), version) for version in (0, 1)}
    lab = Lab(paths[0], temperature=1.0, needs=Needs(behaviour_logp=True))
    for version in (0, 1):
        if version:
            lab.runner.run(lab.update(version, paths[version]))
        for rollout in lab.rollouts(prompts(3)):
            assert rollout.segments == (Segment(first_token=0, version=version),)
            assert_equals_reference(rollout, reference(rollout, paths, 1.0), 1e-3)
    lab.close()


@pytest.fixture(scope="module")
def tied_lab(models, engine_environment):
    lab = Lab(models["tied_old"], temperature=1.0, needs=Needs(behaviour_logp=True), keep_kv=True, timeout_s=4.0)
    yield lab
    lab.close()


def prompts(count, first=0):
    return [Prompt(index=first + i, token_ids=np.arange(5 + i, 20 + 3 * i, dtype=np.int32) % VOCAB) for i in range(count)]


def reference(rollout, paths, temperature):
    """[R, V] log b: each segment under the weights of its version."""
    starts = [s.first_token for s in rollout.segments] + [len(rollout.response_ids)]
    parts = [
        forward_logp(paths[s.version], rollout.prompt_ids, rollout.response_ids, temperature)[start:stop]
        for s, start, stop in zip(rollout.segments, starts, starts[1:])
    ]
    return torch.cat(parts)


def assert_equals_reference(rollout, logp, tolerance):
    def at(ids):
        return logp.gather(-1, torch.tensor(ids).long().reshape(len(logp), -1)).numpy()

    assert np.abs(at(rollout.response_ids)[:, 0] - rollout.logp).max() < tolerance
    if rollout.head_ids is not None:
        assert np.abs(at(rollout.head_ids) - rollout.head_logp).max() < tolerance
        assert np.abs(logp.topk(rollout.head_ids.shape[1])[0].numpy() - rollout.head_logp).max() < tolerance, "the head is the top of b"
        rows = np.repeat(np.arange(len(logp)), rollout.draw_sizes)
        assert np.abs(logp[rows, rollout.draw_ids].numpy() - rollout.draw_logp).max() < tolerance
        assert not (rollout.draw_ids[:, None] == rollout.head_ids[rows]).any()
        assert (np.bincount(rows, rollout.draw_counts) == EVERYTHING.draws).all()


def assert_ends(pid):
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"engine process {pid} is still there"
        time.sleep(0.05)


def test_everything_reported_equals_the_forward_pass_at_temperature_0_7(lab, models):
    for rollout in lab.rollouts(prompts(8)):
        assert_equals_reference(rollout, reference(rollout, [models["old"]], 0.7), 1e-4)
        assert rollout.segments == (Segment(first_token=0, version=0),)
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] == END)
        assert END not in rollout.response_ids[:-1]
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 120
        assert rollout.response_ids.dtype == np.int32 and rollout.head_ids.dtype == np.int32 and rollout.logp.dtype == np.float32


def test_draws_follow_the_tail_of_b(lab, models):
    same = prompts(1)[0]
    again = [Prompt(index=index, token_ids=same.token_ids) for index in range(200)]  # what is drawn follows from the index
    firsts = [(r, slice(0, r.draw_sizes[0])) for r in lab.rollouts(again)]
    drawn = np.concatenate([np.repeat(r.draw_ids[first], r.draw_counts[first]) for r, first in firsts])
    logp = forward_logp(models["old"], same.token_ids, [0], 0.7)[0]
    tail = logp.exp().index_fill(0, logp.topk(4)[1], 0)
    tail = (tail / tail.sum()).numpy()
    count = np.bincount(drawn, minlength=VOCAB)
    likely = np.argsort(-tail)[:10]
    error = np.abs(count[likely] - len(drawn) * tail[likely]) / np.sqrt(len(drawn) * tail[likely])
    assert error.max() < 4.5, "within sampling noise at the ten likeliest ids"
    assert (count[tail == 0] == 0).all()


def test_a_response_goes_on_behind_what_is_there_and_its_pieces_equal_the_forward_pass(lab, models):
    (whole,) = lab.rollouts(prompts(1, first=40))
    assert len(whole.response_ids) > 12
    (piece,) = lab.rollouts([replace(prompts(1, first=40)[0], begun_ids=whole.response_ids[:12])])
    assert piece.segments == (Segment(first_token=12, version=0),)
    assert len(piece.response_ids) <= 108 and piece.finish_reason in ("stop", "length")
    logp = forward_logp(models["old"], whole.prompt_ids, np.concatenate((whole.response_ids[:12], piece.response_ids)), 0.7)
    assert_equals_reference(piece, logp[12:], 1e-4)


def test_an_update_in_mid_response_preempts_and_every_row_belongs_to_its_version(lab, models):
    rollouts = lab.rollouts(prompts(12), update=(1, models["new"]))
    assert sum(len(r.segments) == 2 for r in rollouts) >= 3, "the update arrived while responses were being drawn"
    for rollout in rollouts:
        assert [s.version for s in rollout.segments] in ([0], [1], [0, 1])
        assert_equals_reference(rollout, reference(rollout, [models["old"], models["new"]], 0.7), 1e-4)


def test_after_an_update_nothing_is_left_of_the_old_weights(lab, models):
    lab.runner.run(lab.update(2, models["old"]))
    lab.rollouts(prompts(4))  # fills the prefix cache
    seconds = lab.runner.run(lab.update(3, models["new"]))
    assert set(seconds) == {"pause", "receive", "swap", "resume"}
    for rollout in lab.rollouts(prompts(4)):
        assert rollout.segments == (Segment(first_token=0, version=3),)
        assert_equals_reference(rollout, reference(rollout, {3: models["new"]}, 0.7), 1e-3)


def test_a_cancelled_request_leaves_the_engine_well(lab, models):
    async def run():
        task = asyncio.create_task(lab.engine.generate(prompts(1)[0]))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        return await lab.engine.generate(prompts(1)[0])

    rollout = lab.runner.run(run())
    assert_equals_reference(rollout, reference(rollout, {rollout.segments[0].version: models["new"]}, 0.7), 1e-3)


def test_responses_that_are_read_again_may_be_more_than_one_engine_step_takes(lab, models):
    """vLLM reads 2048 tokens a step; a seeded request of which it read a part ended its engine on CPU."""
    ids = np.arange(330, dtype=np.int32)
    long = [Prompt(index=i, token_ids=(ids + i) % VOCAB) for i in range(12)]
    version, paths = lab.rollouts(prompts(1))[0].segments[0].version, [models["new"], models["old"]]
    for after_s in (0.2, 0.1, 0.3, 0.05):  # until the update meets them in mid-response
        rollouts = lab.rollouts(long, update=(version + 1, paths[1]), after_s=after_s)
        halves = [r for r in rollouts if len(r.segments) == 2]
        if len(halves) * len(ids) > 2048:
            break
        version, paths = version + 1, paths[::-1]
    else:
        pytest.fail("the update never came while responses were being drawn")
    for rollout in halves:
        assert_equals_reference(rollout, reference(rollout, {version: paths[0], version + 1: paths[1]}, 0.7), 1e-3)


def test_a_prompt_that_cannot_be_served_is_named(lab):
    with pytest.raises(PeerError, match="prompt 5"):
        lab.runner.run(lab.engine.generate(Prompt(index=5, token_ids=np.zeros(600, dtype=np.int32))))


def test_a_killed_engine_is_a_peer_error(lab):
    async def run():
        task = asyncio.create_task(lab.engine.generate(prompts(1)[0]))
        await asyncio.sleep(0.02)
        os.kill(lab.pid, signal.SIGKILL)
        await task

    with pytest.raises(PeerError, match=f"rollout engine .pid {lab.pid}. failed on prompt 0"):
        lab.runner.run(run())
    with pytest.raises(WeightSyncError, match="could not begin to receive version 9"):
        lab.runner.run(lab.engine.receive_weights(9))


def test_a_tied_model_follows_an_update_in_head_and_embedding(tied_lab, models):
    paths = {0: models["tied_old"], 1: models["tied_new"]}
    for rollout in tied_lab.rollouts(prompts(3)):
        assert_equals_reference(rollout, reference(rollout, paths, 1.0), 1e-4)
    tied_lab.runner.run(tied_lab.update(1, models["tied_new"]))
    for rollout in tied_lab.rollouts(prompts(3)):
        assert rollout.segments == (Segment(first_token=0, version=1),)
        assert_equals_reference(rollout, reference(rollout, paths, 1.0), 1e-3)


def test_kept_kv_is_stale_for_running_requests_and_for_no_new_one(tied_lab, models):
    paths = {1: models["tied_new"], 2: models["tied_old"]}
    running = tied_lab.rollouts(prompts(12), update=(2, models["tied_old"]))
    crossed = [r for r in running if len(r.segments) == 2]
    assert crossed
    gaps = []
    for rollout in crossed:
        cut = rollout.segments[1].first_token
        sampled = torch.tensor(rollout.response_ids).long()[:, None]
        gap = np.abs(reference(rollout, paths, 1.0).gather(-1, sampled)[:, 0].numpy() - rollout.logp)
        assert gap[:cut].max() < 1e-4
        gaps.append(gap[cut:].max())
    assert max(gaps) > 1e-2, "the test sees the mixture"
    for rollout in tied_lab.rollouts(prompts(3)):
        assert_equals_reference(rollout, reference(rollout, paths, 1.0), 1e-3)


def test_a_sender_that_says_nothing_is_a_weight_sync_error_within_the_timeout(tied_lab):
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"version 3: sender 127.0.0.1:[0-9]+ announced nothing within 4 s"):
        tied_lab.runner.run(tied_lab.engine.receive_weights(3))
    assert time.monotonic() - start < 10


def damage(monkeypatch):
    """The third bucket leaves with a bit that its digest does not know."""
    real, sent = transport._Flight, []

    def faulty(group, bucket, buffer):
        sent.append(bucket)
        if len(sent) == 3:
            buffer[5] ^= 1
        return real(group, bucket, buffer)

    monkeypatch.setattr(transport, "_Flight", faulty)


@pytest.mark.parametrize(
    ("fault", "change", "message"),
    [
        (damage, dict, r"version 3, bucket 2 \(first tensor model\.layers\.0.*bytes changed on the way"),
        (None, lambda tensors: {**tensors, "model.more": torch.zeros(1)}, "version 3 .*it holds model.more, which is unknown"),
        (None, lambda tensors: dict(list(tensors.items())[:-1]), "version 3 .*it lacks model"),
    ],
)
def test_a_failed_update_leaves_the_old_weights_whole_and_a_new_transport_brings_the_next(
    tied_lab, models, monkeypatch, fault, change, message
):
    tied_lab.connect(20.0)

    async def run():
        tasks = [asyncio.create_task(tied_lab.engine.generate(p)) for p in prompts(3)]
        await asyncio.sleep(0.05)
        with monkeypatch.context() as patch:
            if fault:
                fault(patch)
            start = time.monotonic()
            with pytest.raises(WeightSyncError, match=message):
                await tied_lab.update(3, models["tied_new"], change)
            assert time.monotonic() - start < 10
        return await asyncio.gather(*tasks, *(tied_lab.engine.generate(p) for p in prompts(2)))

    with pytest.raises(WeightSyncError, match="rollout worker 1"):
        rollouts = tied_lab.runner.run(run())
        for rollout in rollouts:
            assert rollout.segments == (Segment(first_token=0, version=2),)
            assert_equals_reference(rollout, reference(rollout, {2: models["tied_old"]}, 1.0), 1e-3)
        tied_lab.sent.result()
    tied_lab.connect(4.0)
    tied_lab.runner.run(tied_lab.update(2, models["tied_old"]))


def test_closing_gives_up_running_requests_and_ends_the_process(tied_lab):
    async def run():
        task = asyncio.create_task(tied_lab.engine.generate(prompts(1)[0]))
        await asyncio.sleep(0.05)
        await tied_lab.engine.close()
        await task

    with pytest.raises(PeerError, match="was closed before it finished prompt 0"):
        tied_lab.runner.run(run())
    assert_ends(tied_lab.pid)


ORPHAN = """
import asyncio, sys
from megatron_opd import roles
from megatron_opd.config import RolloutConfig, load
from megatron_opd.placement import Process
from megatron_opd.rollout.engine import EngineSettings, VLLMRollout
from megatron_opd.types import Needs

async def main():
    rollout = RolloutConfig(dtype="float32", max_running=4, kv_cache_bytes=16 << 20)
    engine = await VLLMRollout.start(EngineSettings(rollout=rollout, path=sys.argv[1], needs=Needs(), max_model_len=300))
    print("engine", engine._name.split("pid ")[1].rstrip(")"), flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_process_dies_with_its_parent(models, tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    command = [sys.executable, str(script), models["old"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}) as parent:
        pid = next(int(line.split()[1]) for line in parent.stdout if line.startswith("engine"))
        assert psutil.pid_exists(pid)
        parent.kill()
    assert_ends(pid)


def test_settings_that_cannot_be_served_are_refused(models):
    def settings(needs, **changes):
        return EngineSettings(rollout=RolloutConfig(**changes), path=models["old"], needs=needs, max_model_len=64)

    with pytest.raises(ConfigError, match=r"rollout.top_p=0.9 cuts the distribution"):
        settings(EVERYTHING, top_p=0.9)
    settings(Needs(behaviour_logp=True), top_p=0.9)
    settings(Needs(head=VOCAB))
    with pytest.raises(ConfigError, match=f"a head of {VOCAB} ids leaves no tail"):
        settings(Needs(head=VOCAB, draws=1))


class _Endless:
    """An engine whose responses never end."""

    async def generate(self, *words):
        await asyncio.sleep(60)
        yield None

    async def is_paused(self):
        return False

    def shutdown(self, timeout):
        pass


class _Torn:
    """An engine of which one worker dies at one call of an update."""

    def __init__(self, at):
        self.at, self.engine_core = at, self

    async def collective_rpc(self, name, args=()):
        if name == self.at:
            raise RuntimeError("worker 1 died")
        return [True, True]

    async def pause_scheduler_async(self, **words):
        pass


@pytest.mark.parametrize(
    ("at", "error"), [("opd_begin_update", WeightSyncError), ("opd_update_ready", WeightSyncError), ("opd_swap", PeerError)]
)
def test_an_update_that_fails_before_the_swap_is_a_setback_and_in_it_the_engines_end(at, error):
    settings = EngineSettings(
        rollout=RolloutConfig(), path=str(Path("examples/arithmetic/models/student")), needs=Needs(), max_model_len=64
    )
    with pytest.raises(error, match=r"version 3: worker 1 died"):
        asyncio.run(VLLMRollout(settings, _Torn(at), 1).receive_weights(3))


def test_a_role_that_is_stopped_amid_responses_ends_well(tmp_path, monkeypatch):
    config = load(Path("examples/arithmetic/config.yaml"), [f"run.dir={tmp_path}"])

    async def start(settings):
        return VLLMRollout(settings, _Endless(), 1)

    async def play():
        async with rpc.Hub(tmp_path / "keys", "127.0.0.1", 0) as hub:
            rpc.publish_address(tmp_path / "controller.json", hub.address)
            process = Process(role="rollout", index=0, replica=0, rank=0, world_size=1, cores=())
            role = asyncio.create_task(roles._rollout(config, process))
            (peer,) = await hub.peers("rollout", 1, 60)
            waiting = [asyncio.create_task(peer.call(Generate(prompt=prompt), 60)) for prompt in prompts(3)]
            while peer.outstanding < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert await peer.call(Stop(), 20) == Done()
            await asyncio.wait_for(role, 10)
            for task in waiting:
                task.cancel()

    rpc.make_keys(tmp_path / "keys")
    monkeypatch.setattr(VLLMRollout, "start", start)
    asyncio.run(play())
