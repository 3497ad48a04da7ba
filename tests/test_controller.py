"""The real controller over real wires, with scripted roles: order, lag and versions under adversarial response lengths."""

import asyncio
import json
from collections import Counter

import numpy as np
import pytest
from omegaconf import OmegaConf

from megatron_opd import config as configs
from megatron_opd.controller import Controller, Roles
from megatron_opd.data.prompts import PromptSource, Record
from megatron_opd.errors import PeerError
from megatron_opd.metrics import StepLog
from megatron_opd.rollout.scripted import ScriptedRollout, ScriptedSettings
from megatron_opd.runtime import rpc
from megatron_opd.teacher.scripted import ScriptedTeacher
from megatron_opd.types import (
    Address,
    Done,
    Export,
    Generate,
    HostTransport,
    JoinTransport,
    Needs,
    ReceiveWeights,
    Score,
    StepReport,
    Stop,
    Train,
)

NEEDS = Needs(behaviour_logp=True, teacher_token=True)
VOCAB, STEPS, BATCH = 11, 12, 4


class ScriptedLearner:
    """Counts what it is given; `fail_at` makes that step fail."""

    def __init__(self, fail_at=None):
        self.trained, self.version, self.fail_at, self.exported = [], 0, fail_at, []

    async def answer(self, message):
        if isinstance(message, Train):
            if self.version + 1 == self.fail_at:
                raise ValueError("the script says so")
            lags = Counter()
            for trajectory in message.trajectories:
                assert len(trajectory.teacher.token_logp) == len(trajectory.rollout.response_ids)
                assert trajectory.teacher.index == trajectory.rollout.index
                self.trained.append(trajectory.rollout.index)
                lags.update(self.version - segment.version for segment in trajectory.rollout.segments)
            self.version += 1
            report = {
                "loss": 0.0,
                "diagnostics": {},
                "kl_by_position": {},
                "grad_norm": 0.0,
                "learning_rate": 0.0,
                "sequences": BATCH,
                "tokens": 1,
                "seconds": {},
            }
            return StepReport(version=self.version, lags=dict(lags), **report)
        if isinstance(message, Export):
            self.exported.append((self.version, message.path))
        return Address(host="nowhere", port=0) if isinstance(message, HostTransport) else Done()


async def serve(desk, answer):
    """A role's loop, many answers at once."""
    await desk.greet()

    async def one(number, message):
        try:
            await desk.answer(number, await answer(message))
        except ValueError as error:
            await desk.fail(number, str(error))

    async with asyncio.TaskGroup() as tasks:
        async for number, message in desk.requests():
            if isinstance(message, Stop):
                await desk.answer(number, Done())
                return
            tasks.create_task(one(number, message))


def rollout_answer(rollout):
    async def answer(message):
        match message:
            case Generate(prompt=prompt):
                return await rollout.generate(prompt)
            case JoinTransport():
                return Done()
            case ReceiveWeights(version=version):
                return Done(seconds=await rollout.receive_weights(version))

    return answer


def teacher_answer(teacher):
    async def answer(message):
        assert isinstance(message, Score)
        return teacher.score(message.rollouts)[0]

    return answer


def stragglers(index):
    """Every seventh response is sixty times as long as the others."""
    return 60 if index % 7 == 0 else 1


def play(tmp_path, max_lag, learner, length=stragglers, replicas=2, **loop):
    """A whole run; returns its summary."""

    async def run():
        base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}, "run": {"peer_timeout_s": 20}}
        settings = {"steps": STEPS, "batch": BATCH, "max_lag": max_lag, **loop}
        config = configs.resolve(OmegaConf.create(base | {"loop": settings}))
        rpc.make_keys(tmp_path / "keys")
        record = Record(fields={}, prompt_ids=np.arange(3, dtype=np.int32), completion_ids=None)
        async with rpc.Hub(tmp_path / "keys", "127.0.0.1", 0) as hub, asyncio.TaskGroup() as roles:

            def start(role, replica, answer):
                return roles.create_task(serve(rpc.AsyncDesk(tmp_path / "keys", hub.address, rpc.hello(role, replica)), answer))

            tasks = [
                start("learner", 0, learner.answer),
                start("teacher", 0, teacher_answer(ScriptedTeacher(needs=NEEDS, vocab_size=VOCAB))),
            ]
            for replica in range(replicas):
                script = ScriptedSettings(
                    needs=NEEDS, vocab_size=VOCAB, max_response_tokens=64, end_id=0, seed=replica, token_s=0.001, length=length
                )
                tasks.append(start("rollout", replica, rollout_answer(ScriptedRollout(script))))
            peers = Roles(
                learner=(await hub.peers("learner", 1, 60))[0],
                rollouts=await hub.peers("rollout", replicas, 60),
                teachers=await hub.peers("teacher", 1, 60),
            )
            log = StepLog(tmp_path)
            controller = Controller(config, PromptSource([record], seed=0, shuffle=False), peers, log)
            try:
                summary = await controller.run("export")
                await controller.stop()
            finally:
                log.close()
                for task in tasks:
                    task.cancel()
        return summary

    return asyncio.run(run())


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_every_prompt_is_trained_once_in_order_within_the_bound(tmp_path, max_lag):
    learner = ScriptedLearner()
    summary = play(tmp_path, max_lag, learner)
    assert learner.trained == list(range(STEPS * BATCH))
    assert summary.observed_lag_max <= max_lag
    assert max_lag == 0 or summary.observed_lag_max > 0, "nothing was ever stale: the run was not asynchronous"
    assert summary.steps == STEPS and summary.tokens == STEPS and summary.hf_export == "export"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("max_lag", [1, 3])
def test_an_exact_lag_is_the_lag_of_every_batch_but_the_first_ones(tmp_path, max_lag):
    learner = ScriptedLearner()
    play(tmp_path, max_lag, learner, exact_lag=True)
    assert learner.trained == list(range(STEPS * BATCH))
    lags = [json.loads(line)["lags"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(one) for one in lags] == [[str(min(step, max_lag))] for step in range(STEPS)]


def test_the_student_is_exported_on_the_way(tmp_path):
    learner = ScriptedLearner()
    play(tmp_path, 1, learner, export_every=5)
    assert learner.exported == [(5, "export-5"), (10, "export-10"), (12, "export")]


def test_asynchrony_hides_stragglers(tmp_path):
    walls = {}
    for max_lag in (0, 3):
        (tmp_path / str(max_lag)).mkdir()
        walls[max_lag] = play(tmp_path / str(max_lag), max_lag, ScriptedLearner()).wall_seconds
    assert walls[3] < walls[0]


def test_a_failed_step_ends_the_run_and_names_the_learner(tmp_path):
    with pytest.raises(ExceptionGroup) as caught:
        play(tmp_path, 1, ScriptedLearner(fail_at=3))
    error = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PeerError) and "learner 0" in str(error) and "the script says so" in str(error)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
