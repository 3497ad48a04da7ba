"""A checkpoint is there whole or not at all, and those that are not to be kept go."""

import math
from dataclasses import replace

import pytest

from megatron_opd.config import CheckpointConfig
from megatron_opd.errors import CheckpointError
from megatron_opd.store.checkpoints import Checkpoints
from megatron_opd.types import GuardState, RunState

STATE = RunState(
    version=0,
    prompts=0,
    metrics_bytes=17,
    settings="d",
    tokens=5,
    wall_seconds=1.5,
    lag_histogram={0: 3, 1: 2},
    seconds_by_stage={"train": 0.5},
    busy_seconds={"learner": 1.0},
    guard=GuardState(lengths=(1.0, 2.0), first_length=3.0),
)


def write(checkpoints, version, metrics=None):
    folder = checkpoints.begin(version)
    (folder / "weights").write_bytes(b"x" * version)
    checkpoints.describe(replace(STATE, version=version, metrics=metrics or {}))
    checkpoints.commit(version)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("keep_every", "kept"), [(0, [4, 5]), (2, [2, 4, 5])])
def test_the_last_ones_and_every_mth_are_kept(tmp_path, keep_every, kept):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=keep_every))
    assert checkpoints.newest() is None and checkpoints.size() == 0
    for version in range(1, 6):
        write(checkpoints, version)
    assert names(tmp_path) == [f"step-{version:08}" for version in kept]
    folder, state = checkpoints.newest()
    assert state == replace(STATE, version=5) and (folder / "weights").read_bytes() == b"x" * 5
    assert checkpoints.size() == 5 + (folder.parent / "run.json").stat().st_size


def test_those_with_the_lowest_metric_are_kept_and_a_step_without_one_is_the_worst(tmp_path):
    scores = [0.5, 0.1, math.nan, 0.3, 0.1, 0.4, 0.9]
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=3, best_by="kl"))
    for version, score in enumerate(scores, 1):
        write(checkpoints, version, {"loss": -score, "kl": score})
    assert names(tmp_path) == [f"step-{version:08}" for version in (2, 4, 5, 7)]
    few = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=1))  # by the loss, from now on
    write(few, 8, {"loss": 0.0, "kl": math.inf})
    assert names(tmp_path) == ["step-00000007", "step-00000008"]
    assert few.newest()[1].metrics == {"loss": 0.0, "kl": None}


def test_what_was_not_committed_is_no_checkpoint_and_goes(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    write(checkpoints, 1)
    (checkpoints.begin(2) / "weights").write_bytes(b"half")
    again = Checkpoints(tmp_path, CheckpointConfig())
    assert again.newest()[1].version == 1 and len(names(tmp_path)) == 2
    again.clear()
    assert names(tmp_path) == ["step-00000001"]
    write(again, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_kill_amid_a_removal_leaves_no_half_under_a_name(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=1))
    write(checkpoints, 1, {"loss": 2.0})

    def half(folder, ignore_errors=False):
        if ignore_errors:
            return
        (folder / "run.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_opd.store.checkpoints.shutil.rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        write(checkpoints, 2, {"loss": 1.0})
    monkeypatch.undo()
    (tmp_path / "step-2.bak").mkdir()  # somebody's own
    again = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=1))
    again.clear()
    write(again, 3, {"loss": 3.0})
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-2.bak"] and again.newest()[1].version == 3


def test_a_damaged_state_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    write(checkpoints, 3)
    (tmp_path / "step-00000003" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000003/run.json does not load: .*; remove .*step-00000003 to go on"):
        checkpoints.newest()


@pytest.mark.parametrize(("by", "best"), [("loss", 2), ("student_entropy", 2), ("agreement", 1), ("support_mass", 1)])
def test_the_best_is_the_highest_where_more_is_better(tmp_path, by, best):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=1, best_by=by))
    for version, value in enumerate([0.9, 0.3, 0.5], 1):
        write(checkpoints, version, {by: value})
    assert names(tmp_path) == [f"step-0000000{best}", "step-00000003"]
