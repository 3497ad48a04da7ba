"""A learner that was saved and loaded goes on as if nothing had happened: bit for bit, and in another layout to rounding."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config import LearnerConfig, OptimizerConfig
from megatron_opd.errors import UnsavedError
from megatron_opd.estimators import build
from megatron_opd.learner.learner import Learner, StudentModel
from megatron_opd.runtime.collective import Ranks
from tests.learner.cases import trajectories
from tests.model.tiny import read_config, write_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines

ESTIMATOR = build("forward_kl_topk", {"top_k": 5})
STEPS, SAVED_AT = 6, 3


def train(folder, layout, dtype, load, save):
    """Trains to step `STEPS` from a checkpoint or from the start; on the way saves what `SAVED_AT` steps made."""
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=3, decay="cosine", weight_decay=0.1)
    settings = LearnerConfig(**layout, micro_batch_tokens=16, dtype=dtype, optimizer=optimizer)
    student = StudentModel(path=folder, hf_config=read_config(folder), steps=10, seed=0, device="cpu")
    learner = Learner(student, settings, ESTIMATOR, Ranks())
    if load:
        learner.load(load)
    reports = []
    while learner.version < STEPS:
        reports.append(learner.train(trajectories(ESTIMATOR.needs, vocab=507, seed=learner.version)))
        if save and learner.version == SAVED_AT:
            torch.rand(7)  # the generator is somewhere else than where it began
            learner.save(save)  # written while the next step changes the weights
    if save:
        learner.finish_save()
    weights = {name: tensor.clone() for name, tensor in learner.weights("float32")}
    curve = {name: [getattr(report, name) for report in reports] for name in ("loss", "grad_norm", "learning_rate")}
    return {**curve, "generator": torch.get_rng_state(), "weights": weights if dist.get_rank() == 0 else {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "student", "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """(checkpoint of one rank, how that rank went on)."""
    path = str(tmp_path_factory.mktemp("checkpoint"))
    return path, run_ranks(train, 1, folder, {}, "float32", "", path)[0]


def test_a_loaded_learner_goes_on_bit_for_bit(folder, saved):
    path, whole = saved
    found = run_ranks(train, 1, folder, {}, "float32", path, "")[0]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert found[name] == whole[name][SAVED_AT:], name
    assert torch.equal(found["generator"], whole["generator"])
    assert all(torch.equal(found["weights"][name], weight) for name, weight in whole["weights"].items())
    assert len({*whole["loss"]}) == STEPS, "every step differs from the others"


def test_a_checkpoint_loads_in_another_layout(folder, saved):
    """In two pipeline stages; tests/run/test_resume.py has tensor parallelism."""
    path, whole = saved
    found = run_ranks(train, 2, folder, {"pipeline_parallel": 2}, "float32", path, "")[0]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert found[name] == pytest.approx(whole[name][SAVED_AT:], rel=1e-5), name


def test_two_replicas_go_on_from_a_bfloat16_checkpoint_of_two_tensor_ranks(folder, tmp_path):
    """Masters and moments are float32 on disk, so the step after loading is that of an undisturbed run to the layouts' own rounding."""
    whole = run_ranks(train, 2, folder, {"tensor_parallel": 2}, "bfloat16", "", str(tmp_path))[0]
    found = run_ranks(train, 2, folder, {"data_parallel": 2}, "bfloat16", str(tmp_path), "")[0]
    assert found["loss"] == pytest.approx(whole["loss"][SAVED_AT:], rel=0.01)
    assert found["learning_rate"] == whole["learning_rate"][SAVED_AT:]


def save_without_room(folder, small, large):
    """Makes a step, begins its checkpoint where it does not fit, makes another one, saves that elsewhere; returns why the first failed."""
    student = StudentModel(path=folder, hf_config=read_config(folder), steps=10, seed=0, device="cpu")
    learner = Learner(student, LearnerConfig(data_parallel=dist.get_world_size()), ESTIMATOR, Ranks())
    learner.train(trajectories(ESTIMATOR.needs, vocab=507))
    learner.save(small)
    learner.train(trajectories(ESTIMATOR.needs, vocab=507))
    try:
        learner.finish_save()
    except UnsavedError as error:
        fault = str(error)
    learner.save(large)
    learner.finish_save()
    return fault, learner.version


def test_a_learner_whose_checkpoint_finds_no_room_goes_on_and_saves_again(folder, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        found = run_ranks(save_without_room, 2, folder, str(small), str(large))
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    for fault, version in found:
        assert f"{small} could not be written" in fault and version == 2
    assert list(large.glob("*.distcp")) and (large / ".metadata").exists()


EXPERT_PARALLEL = {"data_parallel": 2, "expert_parallel": 2}


def train_experts_apart(folder, load, save):
    """Experts split over two ranks: from the start, from what one rank saved, and from what these two did."""
    return [train(folder, EXPERT_PARALLEL, "float32", path, "" if path else save) for path in ("", load, save)]


def test_experts_that_are_split_over_ranks_train_alike_and_go_on_wherever_they_were_saved(tmp_path):
    folder = write_model(tmp_path / "student", "qwen3_moe", num_hidden_layers=2)
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    for path in (one, two):
        Path(path).mkdir()
    whole = run_ranks(train, 1, folder, {}, "float32", "", one)[0]
    apart, from_one, from_two = run_ranks(train_experts_apart, 2, folder, one, two, timeout_s=240)[0]
    together = run_ranks(train, 1, folder, {}, "float32", two, "")[0]
    assert apart["loss"][SAVED_AT:] == from_two["loss"] and torch.equal(apart["generator"], from_two["generator"]), "bit for bit"
    for name in ("loss", "grad_norm", "learning_rate"):
        assert apart[name] == pytest.approx(whole[name], rel=1e-5), name
        for found in (from_one, together):
            assert found[name] == pytest.approx(whole[name][SAVED_AT:], rel=1e-5), name


def damaged(folder, path, message):
    with pytest.raises(AssertionError, match=message):
        run_ranks(train, 1, folder, {}, "float32", str(path), "")


def test_a_damaged_checkpoint_is_refused_by_name(folder, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "short")
    largest = max((tmp_path / "short").glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    damaged(folder, tmp_path / "short", f"CheckpointError: .*{largest.name} is truncated")
