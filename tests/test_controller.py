"""The real controller over real wires, with scripted roles: order, lag and versions under adversarial response lengths."""

import asyncio
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from megatron_opd import config as configs
from megatron_opd.controller import Controller, Roles
from megatron_opd.data.faults import Limits
from megatron_opd.data.prompts import PromptSource, Record
from megatron_opd.errors import GuardError, PeerError, StalenessError, WeightSyncError
from megatron_opd.fleet import Fleet, Samplers, Seat
from megatron_opd.metrics import StepLog
from megatron_opd.recovery import Recovery, rewind
from megatron_opd.rollout.scripted import ScriptedRollout, ScriptedSettings
from megatron_opd.runtime import rpc
from megatron_opd.runtime.rendezvous import listening_store
from megatron_opd.teacher.scripted import ScriptedTeacher
from megatron_opd.types import (
    Address,
    Done,
    Export,
    FinishCheckpoint,
    Generate,
    HostTransport,
    JoinTransport,
    LoadCheckpoint,
    Needs,
    ReceiveWeights,
    SaveCheckpoint,
    Saved,
    Score,
    SendWeights,
    StepReport,
    Stop,
    Train,
)
from tests.store.test_journal import recovered

NEEDS = Needs(behaviour_logp=True, teacher_token=True)
VOCAB, STEPS, BATCH = 11, 12, 4


class ScriptedLearner:
    """Counts what it is given; `fail_at` makes that step fail, `lag` is what it reports at step 3 whatever it was given."""

    def __init__(self, fail_at=None, lag=None):
        self.lag = lag
        self.trained, self.version, self.fail_at, self.exported, self.scored = [], 0, fail_at, [], []
        self.unsaved = []  # faults of the next checkpoints

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
            if self.version == 3 and self.lag is not None:
                lags = Counter({0: 5, self.lag: 2})
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
        if isinstance(message, SaveCheckpoint):
            self.saving = Path(message.path, "version")
            self.saving.write_text(str(self.version))
        if isinstance(message, FinishCheckpoint):
            assert self.saving.exists()
            return Saved(fault=self.unsaved.pop() if self.unsaved else "")
        if isinstance(message, LoadCheckpoint):
            self.version = int(Path(message.path, "version").read_text())
        return Address(host="127.0.0.1", port=0) if isinstance(message, HostTransport) else Done()


async def serve(desk, answer):
    """A role's loop, many answers at once."""
    await desk.greet()

    async def one(number, message):
        try:
            await desk.answer(number, await answer(message))
        except WeightSyncError as error:
            await desk.fail(number, str(error), setback=True)
        except ValueError as error:
            await desk.fail(number, str(error))

    try:
        async with asyncio.TaskGroup() as tasks:
            async for number, message in desk.requests():
                if isinstance(message, Stop):
                    await desk.answer(number, Done())
                    return
                tasks.create_task(one(number, message))
    finally:
        desk.close()


def rollout_answer(rollout, change=lambda rollout: rollout):
    async def answer(message):
        match message:
            case Generate(prompt=prompt):
                return change(await rollout.generate(prompt))
            case JoinTransport():
                return Done()
            case ReceiveWeights(version=version):
                return Done(seconds=await rollout.receive_weights(version))

    return answer


def teacher_answer(teacher, scored):
    async def answer(message):
        assert isinstance(message, Score)
        scored.append(message.rollouts[0].index)
        return teacher.score(message.rollouts)[0]

    return answer


def stragglers(index):
    """Every seventh response is sixty times as long as the others."""
    return 60 if index % 7 == 0 else 1


def play(
    tmp_path,
    max_lag,
    learner,
    length=stragglers,
    replicas=2,
    *,
    incident=None,
    heirs=False,
    change=lambda rollout: rollout,
    sections=None,
    patience_s=20,
    **loop,
):
    """A whole run, or the rest of one that `tmp_path` knows of; returns its summary.

    `incident(start, tasks, stop)` runs beside it, and may start a rollout or, where `heirs` says that one is waited for, a learner;
    `change` is what becomes of each rollout; scored prompts end up in `learner.scored`.
    """

    async def run():
        (tmp_path / "prompts.jsonl").write_text("")
        base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": str(tmp_path / "prompts.jsonl")}}
        base |= {"run": {"peer_timeout_s": 20}, "rollout": {"timeout_s": 60}}
        settings = {"steps": STEPS, "batch": BATCH, "max_lag": max_lag, **loop}
        config = configs.resolve(OmegaConf.create(base | {"loop": settings} | (sections or {})))
        rewind(config, tmp_path)
        rpc.make_keys(tmp_path / "keys")
        record = Record(fields={}, prompt_ids=np.arange(3, dtype=np.int32), completion_ids=None)
        async with rpc.Hub(tmp_path / "keys", "127.0.0.1", 0) as hub, asyncio.TaskGroup() as roles:

            def start(role, replica, answer):
                return roles.create_task(serve(rpc.AsyncDesk(tmp_path / "keys", hub.address, rpc.hello(role, replica)), answer))

            def start_role(replica, learner=None):
                if learner is not None:
                    return start("learner", 0, learner.answer)
                script = ScriptedSettings(needs=NEEDS, vocab_size=VOCAB, max_response_tokens=64, end_id=0, token_s=0.001, length=length)
                script = replace(script, piece_tokens=config.rollout.piece_tokens)
                return start("rollout", replica, rollout_answer(ScriptedRollout(script), change))

            tasks = {
                "learner": start("learner", 0, learner.answer),
                "teacher": start("teacher", 0, teacher_answer(ScriptedTeacher(needs=NEEDS, vocab_size=VOCAB), learner.scored)),
            }
            tasks |= {replica: start_role(replica) for replica in range(replicas)}
            for role, count in (("learner", 1), ("rollout", replicas), ("teacher", 1)):
                await hub.peers(role, count, 60)
            within_s = patience_s if incident else 0
            peer = Seat(hub, "learner", replaced_within_s=within_s if heirs else 0)
            samplers = Samplers(hub, peer, width=1, timeout_s=20, replaced_within_s=within_s)
            peers = Roles(hub=hub, learner=peer, rollouts=samplers, teachers=Fleet(hub, "teacher", replaced_within_s=within_s))
            recovery = Recovery(config, tmp_path)
            log = StepLog(tmp_path, version=recovery.before.version, size=recovery.before.metrics_bytes)
            stop = asyncio.Event()
            if incident:
                tasks["incident"] = roles.create_task(incident(start_role, tasks, stop))
            prompts = PromptSource([record], seed=0, shuffle=False)
            controller = Controller(config, prompts, peers, log, recovery, Limits(vocab_size=VOCAB, response_tokens=64))
            try:
                summary = await controller.run("export", stop)
                await controller.stop()
            finally:
                log.close()
                for task in tasks.values():
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
    error = first_of(caught.value)
    assert isinstance(error, PeerError) and "learner 0" in str(error) and "the script says so" in str(error)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("max_lag", [0, 2])
def test_a_step_on_older_tokens_than_the_bound_ends_the_run_and_one_on_the_bound_does_not(tmp_path, max_lag):
    for lag in (max_lag, max_lag + 1):
        (tmp_path / str(lag)).mkdir()
    assert play(tmp_path / str(max_lag), max_lag, ScriptedLearner(lag=max_lag)).observed_lag_max == max_lag
    with pytest.raises(ExceptionGroup) as caught:
        play(tmp_path / str(max_lag + 1), max_lag, ScriptedLearner(lag=max_lag + 1))
    error = first_of(caught.value)
    assert isinstance(error, StalenessError)
    assert f"step 3 trained on 2 tokens sampled {max_lag + 1} steps before, more than loop.max_lag={max_lag}" in str(error)


def whole_steps(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["prompts"] for line in lines] == [[BATCH * i, BATCH * (i + 1)] for i in range(len(lines))]
    return lines


@pytest.mark.parametrize(("max_lag", "fail_at"), [(0, 3), (0, 6), (0, 9), (3, 2), (3, 7), (3, 12)])
def test_a_run_that_died_goes_on_with_every_prompt_once_and_pays_for_nothing_twice(tmp_path, max_lag, fail_at):
    first, second = ScriptedLearner(fail_at), ScriptedLearner()
    sections = {"checkpoint": {"every_steps": 4}}
    with pytest.raises(ExceptionGroup):
        play(tmp_path, max_lag, first, sections=sections)
    saved = 4 * ((fail_at - 2) // 4)  # a checkpoint is whole once the step behind it is done
    paid = recovered(tmp_path / "journal", saved, BATCH)
    summary = play(tmp_path, max_lag, second, sections=sections)
    assert first.trained[: saved * BATCH] + second.trained == list(range(STEPS * BATCH))
    assert not set(paid.scores) & set(second.scored), "scores were paid twice"
    assert set(paid.scores) >= set(range(saved * BATCH, (fail_at - 1) * BATCH)), "what was trained on had been put down"
    assert sorted({*paid.scores, *second.scored}) == list(range(saved * BATCH, STEPS * BATCH))
    assert summary.observed_lag_max <= max_lag and summary.tokens == STEPS and len(whole_steps(tmp_path)) == STEPS


def test_responses_that_were_under_way_go_on_where_their_last_piece_ended(tmp_path):
    first, second, pieces = ScriptedLearner(fail_at=3), ScriptedLearner(), []

    def note(piece):
        pieces.append((piece.index, piece.segments[0].first_token))
        return piece

    def length(index):
        """The third step, which fails, is there when the fourth is half done."""
        return 1 if index < 2 * BATCH else 24 if index < 3 * BATCH else 60

    sections = {"rollout": {"piece_tokens": 8, "timeout_s": 60}}
    with pytest.raises(ExceptionGroup):
        play(tmp_path, 3, first, length, sections=sections, change=note)
    begun = {index: len(response.response_ids) for index, response in recovered(tmp_path / "journal", 0, BATCH).begun.items()}
    assert begun, "nothing was under way: the case shows nothing"
    assert set(begun.values()) <= set(range(8, 64, 8))
    pieces.clear()
    play(tmp_path, 3, second, length, sections=sections, change=note)
    assert second.trained == list(range(STEPS * BATCH))
    for index, tokens in begun.items():
        assert min(start for number, start in pieces if number == index) == tokens
    assert len(pieces) == len(set(pieces)), "no piece was sampled twice"


def test_a_lost_rollouts_response_goes_on_elsewhere_behind_its_last_piece(tmp_path):
    """All responses are long and one replica is lost amid them: whatever it had handed over is not sampled again."""

    async def lose_one(start, tasks, stop):
        while len(pieces) < 20:
            await asyncio.sleep(0.001)
        tasks[0].cancel()

    pieces, learner = [], ScriptedLearner()

    def note(piece):
        pieces.append((piece.index, piece.segments[0].first_token))
        return piece

    sections = {"rollout": {"piece_tokens": 5, "timeout_s": 60}}
    play(tmp_path, 1, learner, length=lambda index: 40, incident=lose_one, sections=sections, change=note, steps=4)
    assert learner.trained == list(range(4 * BATCH))
    assert {start for _, start in pieces} == set(range(0, 40, 5))
    assert len(pieces) - len(set(pieces)) <= 2 * BATCH, "at most the pieces that were under way"


def test_an_empty_response_is_set_aside_and_known_for_it_after_a_resume(tmp_path):
    def empty(rollout):
        return replace(rollout, response_ids=rollout.response_ids[:0], segments=()) if rollout.index in (5, 21) else rollout

    first, second = ScriptedLearner(fail_at=3), ScriptedLearner()
    with pytest.raises(ExceptionGroup):
        play(tmp_path, 0, first, change=empty)
    play(tmp_path, 0, second, change=empty)
    assert second.trained == [index for index in range(STEPS * BATCH) if index not in (5, 21)]
    reasons = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [one["index"] for one in reasons] == [5, 21] and "0 tokens" in reasons[0]["reason"]


def test_a_piece_that_cannot_be_trained_on_is_not_gone_on_with(tmp_path):
    asked = []

    def broken(piece):
        asked.append((piece.index, piece.segments[0].first_token))
        return replace(piece, response_ids=piece.response_ids + VOCAB) if piece.index == 7 else piece

    learner = ScriptedLearner()
    play(tmp_path, 0, learner, change=broken, sections={"rollout": {"piece_tokens": 8, "timeout_s": 60}}, steps=3)
    assert learner.trained == [index for index in range(3 * BATCH) if index != 7]
    assert [piece for piece in asked if piece[0] == 7] == [(7, 0)]


def test_a_newcomer_that_waits_for_the_end_of_a_long_step_is_waited_for(tmp_path):
    class Slow(ScriptedLearner):
        async def answer(self, message):
            if isinstance(message, Train) and self.version == 4:
                training.set()
                await asyncio.sleep(3)
            return await super().answer(message)

    async def lose_the_only_one(start, tasks, stop):
        await training.wait()
        tasks[0].cancel()
        await asyncio.sleep(0.2)
        tasks["new"] = start(0)

    training, learner = asyncio.Event(), Slow()
    play(tmp_path, 1, learner, replicas=1, incident=lose_the_only_one, patience_s=1)
    assert learner.trained == list(range(STEPS * BATCH))


def test_a_learner_that_is_lost_while_it_loads_is_replaced_too(tmp_path):
    class Unable(ScriptedLearner):
        async def answer(self, message):
            if isinstance(message, LoadCheckpoint):
                raise ValueError("no")
            return await super().answer(message)

    async def another(start, tasks, stop):
        await asyncio.sleep(0.3)
        tasks["second"] = start(0, heir)

    sections = {"checkpoint": {"every_steps": 2}}
    with pytest.raises(ExceptionGroup):
        play(tmp_path, 0, ScriptedLearner(fail_at=6), sections=sections)
    heir = ScriptedLearner()
    play(tmp_path, 0, Unable(), incident=another, heirs=True, sections=sections)
    assert heir.trained == list(range(4 * BATCH, STEPS * BATCH)) and len(whole_steps(tmp_path)) == STEPS


@pytest.mark.parametrize("every", [0, 5])
def test_the_last_step_has_a_checkpoint_so_that_a_finished_run_stays_one(tmp_path, every):
    play(tmp_path, 1, ScriptedLearner(), sections={"checkpoint": {"every_steps": every}})
    again = ScriptedLearner()
    play(tmp_path, 1, again, sections={"checkpoint": {"every_steps": every}})
    assert not again.trained and len(whole_steps(tmp_path)) == STEPS


def test_a_request_to_stop_leaves_a_checkpoint_of_the_step_under_way(tmp_path):
    async def after_a_while(start, tasks, stop):
        while len(first.trained) < 5 * BATCH:
            await asyncio.sleep(0.005)
        stop.set()

    first, second = ScriptedLearner(), ScriptedLearner()
    assert play(tmp_path, 1, first, incident=after_a_while) is None
    assert len(whole_steps(tmp_path)) == first.version < STEPS
    play(tmp_path, 1, second)
    assert first.trained + second.trained == list(range(STEPS * BATCH)) and len(whole_steps(tmp_path)) == STEPS


@pytest.mark.parametrize("failures", [2, 5])
def test_a_checkpoint_that_cannot_be_written_is_followed_by_one_of_a_later_step(tmp_path, failures, caplog):
    learner = ScriptedLearner()
    learner.unsaved = ["no room"] * failures
    if failures == 5:
        with pytest.raises(ExceptionGroup) as caught:
            play(tmp_path, 1, learner, sections={"checkpoint": {"every_steps": 2}})
        assert "5 checkpoints in a row: no room" in str(first_of(caught.value))
        return
    play(tmp_path, 1, learner, sections={"checkpoint": {"every_steps": 7, "keep": 9}})
    assert caplog.text.count("the run has no checkpoint of step 7: no room") == 1
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000012"], "7 and 8 failed; 12 is the last step"
    assert learner.trained == list(range(STEPS * BATCH))


@pytest.mark.parametrize(("max_lag", "replicas"), [(0, 1), (1, 2)])
def test_a_lost_rollout_is_replaced_its_prompts_reissued_and_the_new_one_has_the_current_weights(tmp_path, max_lag, replicas):
    async def lose_one(start, tasks, stop):
        while len(learner.trained) < 6 * BATCH:
            await asyncio.sleep(0.002)
        tasks[0].cancel()
        await asyncio.sleep(1.5)  # the others go on, or all wait
        tasks["new"] = start(0)

    learner = ScriptedLearner()
    summary = play(tmp_path, max_lag, learner, replicas=replicas, incident=lose_one)
    assert learner.trained == list(range(STEPS * BATCH))
    assert summary.observed_lag_max <= max_lag


@pytest.mark.parametrize(("max_lag", "every", "dies_at"), [(0, 3, 6), (0, 0, 4), (3, 3, 7), (3, 20, 11), (1, 1, 5)])
def test_a_lost_learner_is_replaced_by_one_that_makes_the_steps_behind_the_checkpoint_again(tmp_path, max_lag, every, dies_at):
    async def lose(start, tasks, stop):
        while len(first.trained) < dies_at * BATCH:
            await asyncio.sleep(0.001)
        tasks["learner"].cancel()
        await asyncio.sleep(0.3)  # rollouts go on
        tasks["second"] = start(0, second)

    first, second = ScriptedLearner(), ScriptedLearner()
    second.scored = first.scored
    summary = play(tmp_path, max_lag, first, incident=lose, heirs=True, sections={"checkpoint": {"every_steps": every}})
    assert first.trained == list(range(len(first.trained))) and len(first.trained) >= dies_at * BATCH
    saved = second.trained[0] // BATCH
    assert second.trained == list(range(saved * BATCH, STEPS * BATCH)), "from the checkpoint to the end"
    assert saved == 0 if every in (0, 20) else 0 < saved < dies_at + 1
    assert sorted(first.scored) == list(range(STEPS * BATCH)), "no teacher is paid twice"
    assert summary.observed_lag_max <= max_lag and summary.tokens == STEPS and len(whole_steps(tmp_path)) == STEPS


def test_learners_that_keep_dying_or_writing_leave_a_whole_run(tmp_path):
    """One dies while it writes a checkpoint, the next one while it makes old steps again, a third one in an update."""
    lives = [ScriptedLearner() for _ in range(4)]

    async def lose(start, tasks, stop):
        for life, (dies_at, successor) in enumerate([(3, 1), (2, 2), (8, 3)]):
            while lives[life].version < dies_at:
                await asyncio.sleep(0.001)
            tasks["learner" if life == 0 else life].cancel()
            tasks[successor] = start(0, lives[successor])

    for life in lives[1:]:
        life.scored = lives[0].scored
    play(tmp_path, 1, lives[0], replicas=1, incident=lose, heirs=True, sections={"checkpoint": {"every_steps": 2}})
    assert lives[-1].version == STEPS and lives[-1].trained[-1] == STEPS * BATCH - 1
    assert sorted(lives[0].scored) == list(range(STEPS * BATCH)) and len(whole_steps(tmp_path)) == STEPS


@pytest.mark.parametrize("failures", [2, 5])
def test_an_update_that_fails_is_sent_again_to_replicas_that_go_on(tmp_path, monkeypatch, failures):
    left, receive = [*range(failures)], ScriptedRollout.receive_weights

    async def fail_sometimes(self, version):
        if version == 3 and left:
            left.pop()
            raise WeightSyncError("bytes changed on the way")
        return await receive(self, version)

    monkeypatch.setattr(ScriptedRollout, "receive_weights", fail_sometimes)
    learner = ScriptedLearner()
    if failures == 5:
        with pytest.raises(ExceptionGroup) as caught:
            play(tmp_path, 1, learner, replicas=1)
        assert "weights version 3 did not reach the rollouts in 5 attempts" in str(first_of(caught.value))
    else:
        play(tmp_path, 1, learner)
        assert learner.trained == list(range(STEPS * BATCH))


def test_a_rollout_that_dies_in_an_update_does_not_keep_the_learner_waiting(tmp_path, monkeypatch):
    dying, receive = asyncio.Event(), ScriptedRollout.receive_weights

    async def die_at_3(self, version):
        if version == 3 and not dying.is_set():
            dying.set()
            await asyncio.sleep(60)
        return await receive(self, version)

    async def kill(start, tasks, stop):
        await dying.wait()
        tasks[0].cancel()
        tasks["new"] = start(0)

    class Waiting(ScriptedLearner):
        """In that update it hears nothing but what the store says."""

        told = ""

        async def answer(self, message):
            if isinstance(message, HostTransport):
                self.store = listening_store("127.0.0.1", 60)
                return Address(host="127.0.0.1", port=self.store.port)
            if message == SendWeights(version=3) and not self.told:
                await asyncio.to_thread(self.store.wait, ["lost"], timedelta(seconds=10))
                self.told = self.store.get("lost").decode()
                raise WeightSyncError(self.told)
            return await super().answer(message)

    monkeypatch.setattr(ScriptedRollout, "receive_weights", die_at_3)
    learner = Waiting()
    play(tmp_path, 1, learner, replicas=1, incident=kill)
    assert "rollout 0" in learner.told and learner.trained == list(range(STEPS * BATCH))


def test_what_cannot_be_trained_on_is_set_aside_counted_and_limited(tmp_path):
    def poison(rollout):
        return replace(rollout, logp=rollout.logp * np.float32("nan")) if rollout.index in (5, 6) else rollout

    learner = ScriptedLearner()
    assert play(tmp_path, 1, learner, change=poison).set_aside == 2
    assert learner.trained == [index for index in range(STEPS * BATCH) if index not in (5, 6)]
    found = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in found) == [5, 6] and "logp holds nan" in found[0]["reason"]
    assert not {5, 6} & set(learner.scored), "no teacher is paid for it"
    (tmp_path / "limited").mkdir()
    with pytest.raises(ExceptionGroup) as caught:
        play(tmp_path / "limited", 1, ScriptedLearner(), change=poison, sections={"guard": {"set_aside": 1}})
    assert "2 prompts are set aside, more than guard.set_aside=1" in str(caught.value.exceptions)


def test_a_guard_stops_the_run_behind_its_last_good_checkpoint_and_leaves_the_student_that_went_wrong(tmp_path):
    learner = ScriptedLearner()
    sections = {"guard": {"window": 2, "length_growth": 3.0}, "checkpoint": {"every_steps": 4}}
    with pytest.raises(ExceptionGroup) as caught:
        play(tmp_path, 0, learner, length=lambda index: 5 if index < 8 * BATCH else 40, sections=sections)
    error = first_of(caught.value)
    assert isinstance(error, GuardError) and "step 9: responses have grown from 5 to 22 tokens" in str(error)
    assert learner.exported == [(9, "export-9-stopped")] and learner.version == 9
    assert max(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == "step-00000008", "begun before, and finished all the same"


@pytest.mark.parametrize(("replicas", "poison"), [(1, {7}), (2, {7}), (1, {5, 14}), (2, {5, 14})])
def test_prompts_that_rollouts_die_of_are_set_aside_and_no_others(tmp_path, replicas, poison):
    """All that is under way on a replica is lost with it, again and again: only what it dies of may pay for that."""
    deaths = []

    def die(rollout):
        if rollout.index in poison:
            deaths.append(rollout.index)
            raise ValueError("out of memory")
        return rollout

    async def restart(start, tasks, stop):
        for number in itertools.count():
            while len(deaths) <= number:
                await asyncio.sleep(0.005)
            tasks[number, "new"] = start(replicas + number)

    learner = ScriptedLearner()
    play(tmp_path, 3, learner, replicas=replicas, incident=restart, change=die)
    assert learner.trained == [index for index in range(STEPS * BATCH) if index not in poison]
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["index"] for line in lines} == poison and len(lines) == len(poison)
    assert all(
        re.match(r"2 rollouts were lost with it, and 2 more that had nothing else to do: rollout \d.*: out of memory", line["reason"])
        for line in lines
    )
    assert all(line["response_ids"] is None and line["prompt_ids"] == [0, 1, 2] for line in lines)


def test_a_suspect_that_finds_nobody_left_ends_the_run_by_the_role(tmp_path):
    def die(rollout):
        deaths.append(rollout.index)
        raise ValueError("out of memory")

    async def replace_one(start, tasks, stop):
        while not deaths:
            await asyncio.sleep(0.005)
        tasks["new"] = start(1)

    deaths = []
    with pytest.raises(ExceptionGroup) as caught:
        play(tmp_path, 0, ScriptedLearner(), replicas=1, incident=replace_one, change=die, patience_s=1)
    assert "no rollout is left, and none was started in 1 s" in str(first_of(caught.value))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_dies_and_when_every_prompt_is_trained_once_within_the_bound(tmp_path, seed):
    """Rollouts die and are replaced, learners die and are resumed, the journal's tail is damaged; then the audit."""
    rng, max_lag = random.Random(seed), (0, 3)[seed % 2]
    sections = {"checkpoint": {"every_steps": rng.choice([1, 2, 5])}}
    trained: list[int] = []

    async def deaths(start, tasks, stop):
        while True:
            await asyncio.sleep(rng.uniform(0.05, 0.4))
            victim = rng.randrange(2)
            tasks[victim].cancel()
            await asyncio.sleep(rng.uniform(0, 0.4))
            tasks[victim] = start(victim)
            count = len(learner.trained)
            while len(learner.trained) == count:  # on a machine without time to spare no response would outlive its rollout
                await asyncio.sleep(0.005)

    fail_at = sorted(rng.sample(range(2, STEPS + 1), 2))
    for last in (*fail_at, None):
        learner = ScriptedLearner(last)
        try:
            play(tmp_path, max_lag, learner, incident=deaths, sections=sections)
        except ExceptionGroup as error:
            assert "the script says so" in str(first_of(error)), "only the learner ends a run"
        first = learner.trained[0] if learner.trained else len(trained)
        assert first % BATCH == 0 and first <= len(trained)
        trained = trained[:first] + learner.trained
        for file in sorted((tmp_path / "journal").glob("step-*.bin"))[-1:]:
            data = bytearray(file.read_bytes())
            data[-rng.randrange(1, len(data))] ^= 0xFF
            file.write_bytes(data)
    assert trained == list(range(STEPS * BATCH))
    lines = whole_steps(tmp_path)
    assert len(lines) == STEPS and all(int(lag) <= max_lag for line in lines for lag in line["lags"])


def first_of(error):
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
