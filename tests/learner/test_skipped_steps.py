"""A step whose loss or gradient is not finite changes nothing but the count of steps."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from megatron_opd.config import LearnerConfig, OptimizerConfig
from megatron_opd.estimators import build
from megatron_opd.learner.learner import Learner, StudentModel
from megatron_opd.runtime.collective import Ranks
from megatron_opd.types import Estimate
from tests.learner.cases import trajectories
from tests.model.tiny import read_config, write_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines

BASE = build("forward_kl_topk", {"top_k": 5})


@dataclass(frozen=True, kw_only=True)
class Steep:
    """The base's loss, with a gradient that is not finite where the teacher's most probable id is 0: a root at 0."""

    needs = BASE.needs

    def __call__(self, scores):
        logp, steep = scores.top.student_logp[:, 0], (scores.top.ids[:, 0] == 0) & scores.mask
        root = torch.where(steep, logp - logp.detach(), 1.0).sqrt()
        return Estimate(loss=BASE(scores).loss + torch.where(steep, root, 0.0))


def batch(seed, kind):
    """Trajectories without id 0 among the teacher's; the first has a `kind` that is not finite: "loss", "gradient" or "" for neither."""
    made = trajectories(BASE.needs, vocab=31, seed=seed)
    top_ids = [without_zero(one.teacher.top_ids) for one in made]
    top_logp = [one.teacher.top_logp.copy() for one in made]
    if kind == "loss":
        top_logp[0][0, 0] = np.nan
    if kind == "gradient":
        top_ids[0][0, 0] = 0
    return [
        replace(one, teacher=replace(one.teacher, top_ids=ids, top_logp=logp))
        for one, ids, logp in zip(made, top_ids, top_logp, strict=True)
    ]


def without_zero(ids):
    ids = ids.copy()
    for row in ids:
        row[row == 0] = min(set(range(1, 31)) - set(row.tolist()))
    return ids


def play(folder, kinds):
    """Reports of one step per kind, and the weights at the end."""
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=5)
    student = StudentModel(path=folder, hf_config=read_config(folder), steps=10, seed=0, device="cpu")
    learner = Learner(student, LearnerConfig(micro_batch_tokens=16, optimizer=optimizer), Steep(), Ranks())
    reports = [learner.train(batch(seed, kind)) for seed, kind in kinds]
    weights = {name: tensor.clone() for name, tensor in learner.weights("float32")}
    curve = {name: [getattr(report, name) for report in reports] for name in ("version", "loss", "grad_norm", "learning_rate", "skipped")}
    return {**curve, "weights": weights}


def both(folder):
    spoiled = [(0, ""), (1, "loss"), (2, "gradient"), (3, "")]
    return {"spoiled": play(folder, spoiled), "sound": play(folder, [spoiled[0], spoiled[3]])}


def test_a_step_that_is_not_finite_leaves_weights_moments_and_schedule_as_they_were(tmp_path):
    folder = write_model(tmp_path / "student", "qwen3", num_hidden_layers=2, vocab_size=31)
    found = run_ranks(both, 1, folder)[0]
    spoiled, sound = found["spoiled"], found["sound"]
    assert spoiled["skipped"] == [False, True, True, False] and spoiled["version"] == [1, 2, 3, 4]
    assert not np.isfinite(spoiled["loss"][1]) and np.isfinite(spoiled["loss"][2]) and not np.isfinite(spoiled["grad_norm"][2])
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [spoiled[name][0], spoiled[name][3]] == sound[name], name
    assert all(torch.equal(spoiled["weights"][name], weight) for name, weight in sound["weights"].items())
