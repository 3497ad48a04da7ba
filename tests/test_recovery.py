"""A full disk is waited for, a quarantine counts each prompt once, and another run's directory is refused."""

import asyncio
import errno
import json
import os
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from megatron_opd import config as configs
from megatron_opd import recovery
from megatron_opd.errors import CheckpointError, ConfigError, GuardError
from megatron_opd.recovery import Recovery
from megatron_opd.types import Prompt, Rollout, Segment, StepReport


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    base = {"student": {"path": str(tmp_path)}, "teacher": {"path": "t"}, "data": {"prompts": str(tmp_path / "prompts.jsonl")}}

    def make(**sections):
        return configs.resolve(OmegaConf.create(base | sections))

    return make


def rollout(index):
    ids = np.arange(3, dtype=np.int32)
    start = Segment(first_token=0, version=0)
    return Rollout(index=index, prompt_ids=ids, response_ids=ids, segments=(start,), finish_reason="stop")


def prompt(index):
    return Prompt(index=index, token_ids=np.arange(3, dtype=np.int32))


def full_until(times):
    """A write that finds no room so many times."""
    left = [*range(times)]

    def write():
        if left:
            left.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        return "written"

    return write


def test_a_full_disk_is_waited_for_and_not_for_ever(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recovery, "_POLL_S", 0.01)
    patient, hasty = Recovery(settings(), tmp_path), Recovery(settings(supervision={"disk_wait_s": 0}), tmp_path)
    assert asyncio.run(patient.when_there_is_room(full_until(5))) == "written"
    assert caplog.text.count("waits for room on the disk") == 1
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(hasty.when_there_is_room(full_until(5)))
    with pytest.raises(PermissionError):
        asyncio.run(patient.when_there_is_room(_denied))


def test_a_wait_for_room_ends_with_the_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "_POLL_S", 0.01)
    asked = Recovery(settings(), tmp_path, hurried=lambda: True)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(asked.when_there_is_room(full_until(5)))


def test_a_disk_that_is_full_at_the_last_moment_costs_no_checkpoint_and_no_step(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "_POLL_S", 0.01)
    kept = Recovery(settings(), tmp_path)
    asyncio.run(kept.keep(rollout(0)))
    asyncio.run(kept.begin(1))
    sync, left = os.fsync, [*range(3)]

    def full(descriptor):
        if left:
            left.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    asyncio.run(kept.settle(1))
    left += range(3)
    asyncio.run(kept.commit(replace(recovery.beginning(kept.digest), version=1)))
    assert not left and kept.newest()[1] == 1


def test_what_was_sampled_for_other_prompts_is_refused_without_a_checkpoint_too(settings, tmp_path):
    asyncio.run(Recovery(settings(), tmp_path).keep(rollout(0)))
    Recovery(settings(), tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match="was filled under other settings or prompts"):
        Recovery(settings(), tmp_path)


def test_a_damaged_quarantine_is_named(settings, tmp_path):
    (tmp_path / "quarantine.jsonl").write_text('{"index": 3}\n{"indx": 4}\n')
    with pytest.raises(CheckpointError, match=r"quarantine\.jsonl is damaged: KeyError"):
        Recovery(settings(), tmp_path)


def _denied():
    raise PermissionError(errno.EACCES, "no")


def test_a_checkpoint_waits_until_the_disk_has_room_for_it(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recovery, "_POLL_S", 0.01)
    usage = namedtuple("Usage", "free")
    answers = iter([usage(99), usage(699), usage(700)])  # bytes: seven times the student's file are needed
    monkeypatch.setattr(recovery.shutil, "disk_usage", lambda folder: next(answers))
    folder = asyncio.run(Recovery(settings(), tmp_path).begin(7))
    assert folder.is_dir() and caplog.text.count("a checkpoint needs") == 1


def test_a_metric_that_no_step_reports_is_refused_by_name(settings, tmp_path):
    words = {
        "loss": 0.5,
        "kl_by_position": {},
        "grad_norm": 1.0,
        "learning_rate": 1.0,
        "sequences": 1,
        "tokens": 1,
        "lags": {},
        "seconds": {},
    }
    report = StepReport(version=1, diagnostics={"kl": 0.25}, **words)
    assert Recovery(settings(checkpoint={"keep_best": 1, "best_by": "kl"}), tmp_path).metrics(report) == {"loss": 0.5, "kl": 0.25}
    with pytest.raises(ConfigError, match=r"checkpoint\.best_by=KL is nothing that a step of this run reports; use one of loss, kl"):
        Recovery(settings(checkpoint={"keep_best": 1, "best_by": "KL"}), tmp_path).metrics(report)


def test_a_quarantine_counts_each_prompt_once_over_all_processes_of_a_run(settings, tmp_path):
    config = settings(guard={"set_aside": 2})
    for index in (3, 3, 4):
        asyncio.run(Recovery(config, tmp_path).set_aside(prompt(index), rollout(index) if index == 3 else None, "bad"))
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"index": 9, "rea')  # a crash cut it short
    with pytest.raises(GuardError, match=r"prompt 5: bad; with it 3 prompts are set aside, more than guard.set_aside=2"):
        asyncio.run(Recovery(config, tmp_path).set_aside(prompt(5), None, "bad"))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [3, 3, 4, 5]
    assert [line["response_ids"] for line in lines] == [[0, 1, 2], [0, 1, 2], None, None]


def test_settings_and_prompts_that_make_another_run_are_told_apart(settings, tmp_path):
    same = recovery.digest(settings(learner={"tensor_parallel": 2}, run={"port": 9}, loop={"steps": 7}))
    assert same == recovery.digest(settings())
    others = [settings(loop={"batch": 3}), settings(rollout={"temperature": 0.5}), settings(estimator={"settings": {"top_k": 3}})]
    assert len({same, *map(recovery.digest, others)}) == 4
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "b"}\n')
    assert recovery.digest(settings()) != same


def test_a_checkpoint_of_another_run_is_refused(settings, tmp_path):
    kept = Recovery(settings(), tmp_path)

    async def save():
        await kept.begin(1)
        await kept.commit(replace(kept.before, version=1))

    asyncio.run(save())
    assert Recovery(settings(), tmp_path).before.version == 1
    with pytest.raises(ConfigError, match="holds a run with other settings or prompts"):
        Recovery(settings(loop={"batch": 3}), tmp_path)
