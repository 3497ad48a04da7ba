"""A run directory is made once, gone on with on wish, and never mistaken for another run's."""

import json
import math
import shutil
import signal
import sys
import time
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from megatron_opd import config as configs
from megatron_opd import launch, placement
from megatron_opd.config import CheckpointConfig
from megatron_opd.errors import ConfigError
from megatron_opd.launch import Children, RoleDied, StopRequest, alone_in, ends_at, prepare
from megatron_opd.placement import Resources, place
from megatron_opd.recovery import beginning
from megatron_opd.store.checkpoints import Checkpoints


@pytest.fixture
def make(tmp_path):
    """Prepares `tmp_path`/run with changed settings; returns (directory, version)."""
    (tmp_path / "prompts.jsonl").write_text("")
    base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": str(tmp_path / "prompts.jsonl")}}
    base["run"] = {"dir": str(tmp_path / "run")}

    def prepared(*, resume, **sections):
        config = configs.resolve(OmegaConf.merge(base, sections))
        return prepare(config, place(config, Resources(nodes=1), generation=True), resume=resume)

    return prepared


def test_a_run_that_has_made_all_its_steps_keeps_its_summary_unless_it_is_to_make_more(make):
    folder, _ = make(resume=False, loop={"steps": 2})
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
    checkpoints.begin(2)
    checkpoints.describe(replace(beginning(""), version=2))
    checkpoints.commit(2)
    (folder / "summary.json").write_text("{}")
    assert make(resume=True, loop={"steps": 2}) == (folder, 2) and (folder / "summary.json").exists()
    assert make(resume=True, loop={"steps": 3}) == (folder, 2) and not (folder / "summary.json").exists()


def test_a_directory_with_a_run_in_it_is_gone_on_with_on_wish_only(make):
    folder, version = make(resume=True)  # there is none yet: it is started
    assert version == 0
    (folder / "metrics.jsonl").write_text(json.dumps({"version": 1}) + "\n")
    (folder / "journal").mkdir()
    (folder / "controller.json").write_text("{}")
    key = (folder / "keys" / "controller.key").read_bytes()
    with pytest.raises(ConfigError, match=r"is not empty; .* or go on with it by --resume"):
        make(resume=False)
    assert make(resume=True, loop={"steps": 7}, learner={"tensor_parallel": 2}) == (folder, 0)
    assert configs.load(folder / "config.yaml").loop.steps == 7
    assert (folder / "metrics.jsonl").read_text() == "", "no checkpoint: all steps are made again, from the journal"
    assert (folder / "journal").exists() and not (folder / "controller.json").exists()
    assert (folder / "keys" / "controller.key").read_bytes() != key, "keys are those of one start"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loop": {"batch": 5}}, r"cannot be resumed with loop\.batch=5 \(was 64\)"),
        ({"run": {"seed": 1}, "estimator": {"name": "sft"}}, r"with estimator=.*sft.*, run\.seed=1 \(was 0\)"),
    ],
)
def test_other_settings_than_before_are_refused_by_name(make, sections, message):
    folder, _ = make(resume=False)
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=message):
        make(resume=True, **sections)
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("left", [["config.yaml.partial"], ["config.yaml", "logs"], ["config.yaml", "config.yaml.partial", "keys"]])
def test_a_start_that_was_cut_short_is_begun_again(make, tmp_path, left):
    make(resume=True)
    for entry in (tmp_path / "run").iterdir():
        if entry.name not in left:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if "config.yaml.partial" in left:
        (tmp_path / "run" / "config.yaml.partial").write_text("run:\n  di")
    folder, version = make(resume=True)
    assert version == 0 and {"config.yaml", "keys", "logs", "placement.json"} == {entry.name for entry in folder.iterdir()}


def test_what_was_paid_for_is_no_failed_start(make, tmp_path):
    """A run that died before its first checkpoint, and once more as soon as it was resumed."""
    folder, _ = make(resume=False)
    (folder / "journal").mkdir()
    (folder / "journal" / "step-00000001.bin").write_bytes(b"paid")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is not empty; name a new directory, remove the old run, or go on with it by --resume"):
        make(resume=False)
    make(resume=True)
    assert (folder / "journal" / "step-00000001.bin").read_bytes() == b"paid"


def test_a_run_has_one_launcher_at_a_time(make, tmp_path):
    with alone_in(tmp_path / "new" / "run"):
        with pytest.raises(ConfigError, match="run is another process's at the moment"), alone_in(tmp_path / "new" / "run"):
            raise AssertionError("two at once")
    with alone_in(tmp_path / "new" / "run"):
        pass


@pytest.mark.parametrize("sound", [False, True])
def test_a_replacement_that_hangs_before_it_is_ready_is_replaced_too(make, tmp_path, monkeypatch, sound):
    """If it had run well for some time before, it has all its restarts again."""
    if sound:
        monkeypatch.setattr(launch, "_SOUND_S", 0.0)
    folder, _ = make(resume=False, run={"start_timeout_s": 0.3}, supervision={"restarts": 1, "backoff_s": 0})
    for name in ("metrics.jsonl", "controller.json"):
        (folder / name).write_text("")
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    told = []
    with Children(folder, configs.load(folder / "config.yaml"), told.append) as children:
        for process in placement.load(folder):
            if process.role in ("controller", "teacher"):
                children.start(process, replacement=process.role == "teacher")
        with pytest.raises(RoleDied, match="controller did not end" if sound else r"teacher-0: it was not ready within 0\.3 s"):
            children.watch("controller", lambda: None, timeout_s=5 if sound else 20)
    assert len(told) > 1 if sound else len(told) == 1
    assert all("it is replaced (1 of 1 times)" in line for line in told)


@pytest.fixture
def signals():
    """Lets a test take signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_run_ends_before_its_own_limit_or_that_of_the_job_around_it(monkeypatch, signals):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert ends_at(CheckpointConfig()) == math.inf and not StopRequest(math.inf).made
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    assert ends_at(CheckpointConfig(before_limit_s=600)) - time.time() == pytest.approx(400, abs=2)
    assert ends_at(CheckpointConfig(before_limit_s=600, time_limit_s=700)) - time.time() == pytest.approx(100, abs=1), "its own counts"
    with pytest.raises(ConfigError, match=r"time_limit_s=60 leaves no time before checkpoint\.before_limit_s=300"):
        CheckpointConfig(time_limit_s=60)


def test_a_limit_is_no_signal_and_the_second_signal_ends_at_once(signals):
    stop = StopRequest(time.time() + 0.05)
    assert not stop.made
    time.sleep(0.1)
    assert stop.made and stop.why == "before its time limit"
    signal.raise_signal(signal.SIGUSR1)
    assert stop.made and stop.why == "as asked"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_directory_of_something_else_is_left_alone(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        make(resume=True)


def test_a_notice_of_a_role_reaches_the_user(make, tmp_path, monkeypatch):
    folder, _ = make(resume=False)
    speaker = tmp_path / "speaker"
    says = "import time; from megatron_opd.runtime import report; report.notify('no room'); time.sleep(1)"
    speaker.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{says}"\n')
    speaker.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(speaker))
    told = []
    with Children(folder, configs.load(folder / "config.yaml"), told.append) as children:
        children.start(next(process for process in placement.load(folder) if process.role == "controller"))
        children.watch("controller", lambda: None, timeout_s=60)
    assert told == ["no room"]
