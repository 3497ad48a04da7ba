"""A run that was killed and resumed is the run that was left alone: every prompt once, the same losses, the same weights."""

import json
import shutil
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.run import tiny_run

pytestmark = pytest.mark.engines

STEPS, BATCH = 8, 4
# One response at a time, scored alone: then what runs beside a prompt, and how far it had come, leaves no trace in any bit.
SECTIONS = {
    "rollout": {"max_running": 1, "piece_tokens": 7},
    "teacher": {"batch_tokens": 1},
    "estimator": {"name": "head_tail_reverse_kl", "settings": {"head": 4, "draws": 4}},
    "loop": {"steps": STEPS, "batch": BATCH, "max_lag": 0},
    "checkpoint": {"every_steps": 3, "keep": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(tiny):
    """A run that was left alone."""
    tiny_run.train(tiny.config("whole", **SECTIONS))
    return tiny.steps("whole")


@pytest.fixture(scope="module")
def killed(tiny):
    """The directory of the same run, whose learner was killed when a checkpoint and two further steps were on disk."""
    process = tiny_run.start(tiny.config("killed", **SECTIONS, supervision={"restarts": 0}))
    lines, deadline = tiny.folder / "killed" / "metrics.jsonl", time.monotonic() + 200
    while not lines.exists() or lines.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    learner = next(c for c in psutil.Process(process.pid).children() if ["role", "learner"] == c.cmdline()[3:5])
    learner.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "learner-0 was killed by SIGKILL" in output
    return tiny.folder / "killed"


def resumed(tiny, killed, name, **sections):
    """Steps of a copy of the killed run that went on under another name."""
    shutil.copytree(killed, tiny.folder / name)
    output = tiny_run.train(tiny.config(name, **(SECTIONS | sections)), "--resume")
    assert "going on behind step 3" in output
    return tiny.steps(name)


def assert_every_prompt_once(steps):
    assert [step["version"] for step in steps] == list(range(1, STEPS + 1))
    assert [step["prompts"] for step in steps] == [[BATCH * i, BATCH * (i + 1)] for i in range(STEPS)]
    assert all(step["sequences"] == BATCH and list(step["lags"]) == ["0"] for step in steps)


def curve(steps):
    return {name: [step[name] for step in steps] for name in ("loss", "grad_norm", "learning_rate", "tokens", "diagnostics")}


def test_a_killed_and_resumed_run_is_the_undisturbed_one_bit_for_bit(tiny, whole, killed):
    journal = sum(file.stat().st_size for file in (killed / "journal").iterdir())
    assert journal > 0 and [folder.name for folder in (killed / "checkpoints").iterdir()] == ["step-00000003"]
    steps = resumed(tiny, killed, "again")
    assert_every_prompt_once(steps)
    assert curve(steps) == curve(whole)
    ours, theirs = (load_file(tiny.folder / name / "hf" / "model.safetensors") for name in ("again", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = json.loads((tiny.folder / "again" / "checkpoints" / f"step-{STEPS:08}" / "run.json").read_text())
    assert state["prompts"] == STEPS * BATCH
    summary = json.loads((tiny.folder / "again" / "summary.json").read_text())
    assert summary["tokens"] == sum(step["tokens"] for step in whole)


def test_a_run_resumed_at_another_layout_has_the_same_losses(tiny, whole, killed):
    steps = resumed(tiny, killed, "tp2", learner={"tensor_parallel": 2})
    assert_every_prompt_once(steps)
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in whole], rel=1e-5)
