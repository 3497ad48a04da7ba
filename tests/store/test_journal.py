"""What a journal gives back after a crash: all that was whole, nothing that was not, whatever bytes it finds."""

import asyncio
import errno
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.rollout.scripted import ScriptedRollout, ScriptedSettings
from megatron_opd.store import journal as journals
from megatron_opd.store.journal import Journal
from megatron_opd.types import Needs, Prompt, SetAside, Stop
from tests.learner.cases import trajectories
from tests.runtime.test_wire import same

NEEDS = Needs(behaviour_logp=True, head=3, draws=2, teacher_token=True, teacher_head=True, teacher_draws=True)
CASES = [
    replace(one, rollout=replace(one.rollout, index=index), teacher=replace(one.teacher, index=index))
    for index, one in enumerate(trajectories(NEEDS, vocab=31))
]
BATCH = 3


def filled(folder, **options):
    """A journal of eight prompts, the scores of the even ones, and one that was set aside."""
    journal = Journal(folder, batch=BATCH, **options)
    for one in CASES:
        journal.add(one.rollout)
        if one.rollout.index % 2 == 0:
            journal.add(one.teacher)
    journal.add(SetAside(index=7, reason="no reason"))
    return journal


def recovered(folder, version, batch=BATCH):
    """All that a new process finds of the steps behind `version`."""
    journal = Journal(folder, batch=batch)
    journal.forget(version)
    return journal.read(*journal.steps())


@pytest.mark.parametrize("each_record", [False, True])
def test_all_that_was_added_comes_back_even_if_nobody_closed_it(tmp_path, each_record):
    journal = filled(tmp_path / "j", each_record=each_record)
    journal.sync(1)
    paid = recovered(tmp_path / "j", 0)
    assert sorted(paid.rollouts) == list(range(8)) and sorted(paid.scores) == [0, 2, 4, 6]
    assert all(same(paid.rollouts[one.rollout.index], one.rollout) for one in CASES)
    assert all(same(scores, CASES[index].teacher) for index, scores in paid.scores.items())
    assert paid.set_aside == {7: SetAside(index=7, reason="no reason")}


def test_a_checkpoint_makes_whole_files_superfluous(tmp_path):
    journal = filled(tmp_path / "j")
    journal.forget(1)
    assert sorted(file.name for file in (tmp_path / "j").iterdir()) == ["step-00000002.bin", "step-00000003.bin"]
    assert sorted(recovered(tmp_path / "j", 2).rollouts) == [6, 7]
    assert [file.name for file in (tmp_path / "j").iterdir()] == ["step-00000003.bin"]


@given(cut=st.integers(0, 10_000), flip=st.integers(0, 10_000), value=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_torn_or_damaged_tail_costs_only_itself(tmp_path_factory, cut, flip, value):
    folder = tmp_path_factory.mktemp("journal")
    filled(folder).close()
    file = folder / "step-00000001.bin"
    data = bytearray(file.read_bytes())
    flip, cut = flip % len(data), cut % len(data)
    data[flip] ^= value
    file.write_bytes(data[: len(data) - cut])
    damage = min(flip, len(data) - cut)
    whole = [record for end, record in journals.records(bytes(data)) if end <= damage]
    paid = recovered(folder, 0)
    assert sorted(paid.rollouts) == sorted({r.index for r in whole if hasattr(r, "response_ids")} | set(range(3, 8)))
    assert all(same(rollout, CASES[index].rollout) for index, rollout in paid.rollouts.items())
    again = Journal(folder, batch=BATCH)
    again.add(CASES[2].rollout)  # what was cut off can be written anew, behind what is whole
    assert 2 in recovered(folder, 0).rollouts


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_records_or_none(data):
    for end, record in journals.records(data):
        assert end <= len(data) and journals.frame(record) in data


def test_a_record_of_another_step_or_kind_is_left_out(tmp_path):
    filled(tmp_path / "j").close()
    file = tmp_path / "j" / "step-00000003.bin"
    file.write_bytes(journals.frame(CASES[0].rollout) + journals.frame(Stop()) + file.read_bytes())
    paid = recovered(tmp_path / "j", 0)
    assert sorted(paid.rollouts) == list(range(8))


def test_pieces_of_a_response_come_back_as_one(tmp_path):
    piece = ScriptedSettings(needs=NEEDS, vocab_size=31, max_response_tokens=9, end_id=0, length=lambda index: 8, piece_tokens=3)
    journal, backend = Journal(tmp_path / "j", batch=BATCH), ScriptedRollout(piece)
    prompts = [Prompt(index=index, token_ids=np.array([1, 2], dtype=np.int32)) for index in range(3)]
    for _ in range(2):
        for i, prompt in enumerate(prompts[:2]):
            made = asyncio.run(backend.generate(prompt))
            journal.add(made)
            begun = made.response_ids if prompt.begun_ids is None else np.concatenate((prompt.begun_ids, made.response_ids))
            prompts[i] = replace(prompt, begun_ids=begun)
    journal.add(asyncio.run(backend.generate(prompts[0])))  # its last one
    journal.add(asyncio.run(backend.generate(prompts[2])))
    paid = recovered(tmp_path / "j", 0)
    assert sorted(paid.rollouts) == [0] and sorted(paid.begun) == [1, 2]
    assert len(paid.rollouts[0].response_ids) == 8 and paid.rollouts[0].finish_reason == "stop"
    assert np.array_equal(paid.begun[1].response_ids, prompts[1].begun_ids) and len(prompts[1].begun_ids) == 6
    assert len(paid.begun[2].response_ids) == 3


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    journal = filled(tmp_path / "j")
    size = (tmp_path / "j" / "step-00000001.bin").stat().st_size

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    journal._each_record = True
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.add(CASES[1].rollout)
    monkeypatch.undo()
    assert (tmp_path / "j" / "step-00000001.bin").stat().st_size == size
    journal.add(CASES[1].rollout)
    assert same(recovered(tmp_path / "j", 0).rollouts[1], CASES[1].rollout)
