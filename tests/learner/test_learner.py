"""The whole learner on real Megatron ranks: however it is split, one step is the same step."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config import FP8Config, LearnerConfig, OptimizerConfig
from megatron_opd.learner.learner import Learner, StudentModel, TeacherHead
from megatron_opd.runtime.collective import Ranks
from tests.estimators.cases import VARIANTS, variant
from tests.learner.cases import TEACHER_HIDDEN, trajectories
from tests.model.tiny import read_config, write_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines

MODELS = {
    "tied qwen2": ("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "untied qwen3": ("qwen3", {}),
}
ESTIMATORS = {"tied-qwen2": VARIANTS, "untied-qwen3": ("forward_kl_topk", "head_tail_reverse_kl", "dense_kl jsd")}
LAYOUTS = {
    "tp2": {"tensor_parallel": 2},
    "tp2 sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {"data_parallel": 2},
    "tp2 pp2": {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_layers": (1, 3)},
}
# With eps far above any gradient AdamW moves a weight by lr / eps times the gradient: a step shows the gradient itself.
AS_SGD = OptimizerConfig(lr=1e6, eps=1e6, clip_grad=0.0, beta1=0.0, beta2=0.0)


def step(folders, teacher, layout, micro_batch_tokens):
    """Model and estimator -> loss, gradient norm and gradient (under Hugging Face names) of one step; on the first rank."""
    settings = LearnerConfig(**layout, micro_batch_tokens=micro_batch_tokens, logps_chunk_tokens=7, optimizer=AS_SGD)
    ranks = Ranks()
    found = {}
    for folder in folders:
        for name in ESTIMATORS[Path(folder).name]:
            hf_config = read_config(folder)
            head = TeacherHead(path=teacher, hf_config=read_config(teacher), dtype="float32")
            student = StudentModel(path=folder, hf_config=hf_config, steps=10, seed=0, device="cpu", teacher=head)
            estimator = variant(name)
            learner = Learner(student, settings, estimator, ranks)
            before = {key: tensor.clone() for key, tensor in learner.weights("float32")}  # they may share memory with the model
            report = learner.train(trajectories(estimator.needs, vocab=hf_config.vocab_size))
            after = dict(learner.weights("float32"))
            gradient = {key: before[key].double() - after[key].double() for key in before}
            found[f"{Path(folder).name} {name}"] = {
                "loss": report.loss,
                "norm": report.grad_norm,
                "gradient": gradient,
                "tokens": report.tokens,
            }
    return found if dist.get_rank() == 0 else {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [write_model(tmp_path_factory.mktemp("models") / name.replace(" ", "-"), *spec[:1], **spec[1]) for name, spec in MODELS.items()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("teacher") / "teacher", "llama", hidden_size=TEACHER_HIDDEN, head_dim=6, num_hidden_layers=2)


@pytest.fixture(scope="module")
def one_rank(folders, teacher):
    return run_ranks(step, 1, folders, teacher, {}, 4096)[0]


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for case, one in wanted.items():
        assert found[case]["tokens"] == one["tokens"]
        assert found[case]["loss"] == pytest.approx(one["loss"], rel=1e-5), case
        assert found[case]["norm"] == pytest.approx(one["norm"], rel=1e-5), case
        scale = torch.cat([g.flatten() for g in one["gradient"].values()]).norm()
        off = {name: (found[case]["gradient"][name] - gradient).norm() / scale for name, gradient in one["gradient"].items()}
        whole = torch.stack([*off.values()]).norm()
        assert whole < 1e-5, f"{case}: off by {whole:.1e} of the whole gradient, most of it in {max(off, key=off.get)}"


def test_the_gradient_that_a_step_shows_is_the_gradient(one_rank):
    for case, one in one_rank.items():
        norm = torch.cat([g.flatten() for g in one["gradient"].values()]).norm().item()
        assert norm == pytest.approx(one["norm"], rel=1e-4), case
        assert norm > 1e-3, case


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_splitting_the_model_or_the_batch_changes_nothing(folders, teacher, one_rank, layout):
    world = layout.get("tensor_parallel", 1) * layout.get("pipeline_parallel", 1) * layout.get("data_parallel", 1)
    assert_same(run_ranks(step, world, folders, teacher, layout, 16, timeout_s=300)[0], one_rank)


def test_four_tensor_ranks_change_nothing(folders, teacher, one_rank):
    wanted = {case: one for case, one in one_rank.items() if case.startswith("tied-qwen2")}
    assert_same(run_ranks(step, 4, folders[:1], teacher, {"tensor_parallel": 4}, 16, timeout_s=300)[0], wanted)


def test_the_size_of_micro_batches_changes_nothing(folders, teacher, one_rank):
    assert_same(run_ranks(step, 1, folders, teacher, {}, 1)[0], one_rank)


KERNELS = {
    "chunked": {"kernels": "chunked"},
    "auto": {"kernels": "auto"},
    "recompute": {"kernels": "chunked", "schedule": "recompute"},
    "reference": {"kernels": "reference"},
    "te": {"kernels": "te"},
    "te fp8": {"kernels": "te", "fp8": FP8Config(logits="fp8", recipe="mxfp8", noise_every=2)},
}


def steps_by_kernels(folder, teacher):
    """Kernels -> gradient of one step; then what two steps with FP8 logits report and log."""
    found, lines = {}, []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_opd.learner.learner").addHandler(handler)
    logging.getLogger("megatron_opd.learner.learner").setLevel(logging.INFO)
    for name, settings in KERNELS.items():
        hf_config = read_config(folder)
        head = TeacherHead(path=teacher, hf_config=read_config(teacher), dtype="float32")
        student = StudentModel(path=folder, hf_config=hf_config, steps=10, seed=0, device="cpu", teacher=head)
        learner = Learner(student, LearnerConfig(**settings, optimizer=AS_SGD), variant("dense_kl jsd"), Ranks())
        batch = trajectories(learner._needs, vocab=hf_config.vocab_size)
        before = torch.cat([tensor.double().flatten() for _, tensor in learner.weights("float32")])
        reports = [learner.train(batch)]
        found[name] = before - torch.cat([tensor.double().flatten() for _, tensor in learner.weights("float32")])
    reports.append(learner.train(batch))
    noise = [report.diagnostics.get("fp8_noise", -1.0) for report in reports]
    return {"gradients": found, "noise": noise, "kl": reports[0].diagnostics["kl"], "lines": lines}


def test_every_choice_of_kernels_makes_the_same_step_and_the_log_says_which(folders, teacher):
    (found,) = run_ranks(steps_by_kernels, 1, folders[1], teacher)
    exact = found["gradients"].pop("chunked")
    off = {name: ((gradient - exact).norm() / exact.norm()).item() for name, gradient in found["gradients"].items()}
    assert max(off["auto"], off["recompute"], off["reference"]) < 1e-5 and off["te"] < 0.1, off
    said = [line for line in found["lines"] if line.startswith("kernels: ")]
    assert [line.split()[1] for line in said] == ["chunked", "chunked", "chunked", "reference", "te", "te"]
    assert "logits fp8, recipe mxfp8, emulated" in said[-1]
    assert found["noise"][0] > 0 and found["noise"][1] == -1, "measured in every second step"
    warned = [line for line in found["lines"] if "FP8 logits add" in line]
    assert len(warned) == (found["noise"][0] > found["kl"])
