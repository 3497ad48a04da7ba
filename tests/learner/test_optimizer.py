"""Learning rates by their closed forms; what a step does to weights by torch's own clipping in float64; layers that run twice."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config import LearnerConfig, OptimizerConfig
from megatron_opd.estimators import build
from megatron_opd.learner import optimizer
from megatron_opd.learner.learner import Learner, StudentModel
from megatron_opd.runtime.collective import Ranks
from tests.learner.cases import trajectories
from tests.model.tiny import count_layers, read_config, write_model
from tests.ranks import run_ranks

LR, WARMUP, STEPS, RATIO = 3e-4, 4, 12, 0.1
SHAPES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: RATIO + (1 - RATIO) * (1 - done),
    "cosine": lambda done: RATIO + (1 - RATIO) * (1 + math.cos(math.pi * done)) / 2,
}


def learning_rates(steps, count, **settings):
    """What the schedule of a run of `steps` sets before each of its first `count` steps."""
    held = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    schedule, rates = optimizer.schedule(OptimizerConfig(lr=LR, **settings), held, steps=steps), []
    for _ in range(count):
        schedule.step(increment=1)
        rates.append(held.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("decay", SHAPES)
def test_the_learning_rate_rises_evenly_then_falls_to_its_share_of_the_peak(decay, warmup):
    rates = learning_rates(STEPS, STEPS, decay=decay, warmup_steps=warmup, min_lr_ratio=RATIO)
    wanted = [n / warmup if n <= warmup else SHAPES[decay]((n - warmup) / (STEPS - warmup)) for n in range(1, STEPS + 1)]
    assert rates == pytest.approx([LR * share for share in wanted], rel=1e-9)
    assert rates[-1] == pytest.approx(LR if decay == "constant" else LR * RATIO)


def test_a_run_may_end_before_its_warm_up_does():
    assert learning_rates(3, 3, decay="cosine", warmup_steps=6) == pytest.approx([LR / 6, LR / 3, LR / 2])


ESTIMATOR = build("forward_kl_topk", {"top_k": 8})
LAYOUTS = [{"data_parallel": 2}, {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True, "recompute": True}]
CLIPS = (0.0, 0.3, 3.0)  # over the norm; 0 switches clipping off
PEAK = 2e6  # with eps far above any gradient and half of this at step 1 of 2, AdamW moves a weight by its gradient


def updates(folder):
    """By layout: (by clip: the whole update, the norm and the learning rate that the step reports; how often a layer ran)."""
    found = []
    for layout in LAYOUTS:
        norm, steps = 1.0, []
        for clip in CLIPS:
            like_sgd = OptimizerConfig(lr=PEAK, warmup_steps=2, eps=PEAK / 2, beta1=0.0, beta2=0.0, clip_grad=clip * norm)
            student = StudentModel(path=folder, hf_config=read_config(folder), steps=10, seed=0, device="cpu")
            settings = LearnerConfig(**layout, micro_batch_tokens=4096, optimizer=like_sgd)
            learner = Learner(student, settings, ESTIMATOR, Ranks())
            calls = count_layers(learner._module)
            before = [tensor.double().flatten() for _, tensor in learner.weights("float32")]
            report = learner.train(trajectories(ESTIMATOR.needs, vocab=507))
            ran = len(calls)
            after = [tensor.double().flatten() for _, tensor in learner.weights("float32")]
            norm = report.grad_norm
            steps.append([torch.cat(before) - torch.cat(after) if dist.get_rank() == 0 else torch.empty(0), norm, report.learning_rate])
        found.append([steps, ran])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("student") / "student", "qwen3", num_hidden_layers=2)
    return run_ranks(updates, 2, folder)[0]


@pytest.mark.engines
def test_a_gradient_is_clipped_by_the_norm_of_all_of_it_each_shard_counted_once(found):
    gradient = found[0][0][0][0]
    for layout, (steps, _) in zip(LAYOUTS, found, strict=True):
        for clip, (update, norm, learning_rate) in zip(CLIPS, steps, strict=True):
            weight = torch.nn.Parameter(torch.zeros_like(gradient))
            weight.grad = gradient.clone()
            wanted_norm = torch.nn.utils.clip_grad_norm_(weight, clip * gradient.norm() if clip else math.inf)
            assert learning_rate == PEAK / 2 and norm == pytest.approx(wanted_norm.item(), rel=1e-5), (layout, clip)
            assert (update - weight.grad).norm() < 3e-5 * weight.grad.norm(), (layout, clip)


@pytest.mark.engines
def test_recompute_reaches_the_model(found):
    (_, plain), (_, split), (_, recomputed) = found
    assert plain == split == 2 and recomputed == 4, f"layers ran {plain}, {split} and {recomputed} times in a step of one micro-batch"
