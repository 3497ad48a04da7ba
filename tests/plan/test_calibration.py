"""A run that was simulated gives back the costs that it was simulated with."""

import json

import msgspec
import pytest
from omegaconf import OmegaConf

from megatron_opd import config as configs
from megatron_opd import placement
from megatron_opd.errors import ConfigError
from megatron_opd.plan.calibration import calibrated
from megatron_opd.plan.costs import Costs
from megatron_opd.plan.gpus import DECODE_BASE
from megatron_opd.plan.lengths import Lengths
from megatron_opd.plan.memory import Model
from megatron_opd.plan.simulation import simulate
from megatron_opd.types import RunSummary

STUDENT, TEACHER = "examples/arithmetic/models/student", "examples/arithmetic/models/teacher"
TRUE = Costs(
    learner_token_s=2e-4, learner_step_s=0.05, teacher_token_s=7e-5, decode_s=DECODE_BASE * 3e-4, decode_sequence_s=3e-4,
    prefill_token_s=0.0, publish_s=0.06, running=64,
)  # fmt: skip
SECTIONS = {
    "student": {"path": STUDENT},
    "teacher": {"path": TEACHER, "gather_s": 0.05},
    "data": {"prompts": "p", "max_prompt_tokens": 32},
    "rollout": {"max_response_tokens": 48, "max_running": 64},
    "loop": {"batch": 64, "max_lag": 0},
    "plan": {"prompt_tokens": 16, "steps": 8},
}


def a_run(folder, **sections):
    """Writes what a run with those costs would leave."""
    made = configs.resolve(OmegaConf.merge(SECTIONS, {"run": {"dir": str(folder)}}, sections))
    processes = placement.place(made, placement.Resources(nodes=1), generation=True)
    found = simulate(made, processes, TRUE, Lengths(prompt=16, response=22, spread=made.plan.spread, longest=48), 0)
    tokens = found.tokens_s * found.step_s
    computing = TRUE.learner_token_s * (tokens + 64 * 16)
    train = computing + TRUE.learner_step_s
    warm = {
        "stage_seconds": {"wait": 0.0, "train": train, "publish": TRUE.publish_s},
        "seconds": {"pack": 0.0, "forward_backward": computing},
    }
    cold = {part: {name: 9 * seconds for name, seconds in values.items()} for part, values in warm.items()}
    summary = RunSummary(
        steps=1, max_lag=made.loop.max_lag, observed_lag_max=0, lag_histogram={}, tokens=round(tokens), wall_seconds=found.step_s,
        tokens_per_second=found.tokens_s, tokens_per_second_by_stage={}, seconds_by_stage={},
        busy_seconds={role: share * found.step_s for role, share in found.outstanding.items()}, overlap=1.0, hf_export="",
    )  # fmt: skip
    folder.mkdir()
    (folder / "summary.json").write_bytes(msgspec.json.encode(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"mean_length": tokens / 64, **one}) + "\n" for one in (cold, cold, warm)))
    (folder / "config.yaml").write_text(configs.to_yaml(made))
    placement.save(processes, folder)
    return made


def plan_from(folder, **sections):
    settings = {**SECTIONS, "plan": {**SECTIONS["plan"], "calibration": str(folder)}}
    made = configs.resolve(OmegaConf.merge(settings, {"run": {"dir": "unused"}}, sections))
    return calibrated(made, Model.load(made.student.path), Model.load(made.teacher.path))


def test_a_simulated_run_gives_its_costs_back(tmp_path):
    a_run(tmp_path / "run")
    found, lengths = plan_from(tmp_path / "run")
    assert found.learner_token_s == pytest.approx(TRUE.learner_token_s, rel=0.02)
    assert found.learner_step_s == pytest.approx(TRUE.learner_step_s, rel=0.02)
    assert found.publish_s == pytest.approx(TRUE.publish_s)
    assert found.decode_sequence_s == pytest.approx(TRUE.decode_sequence_s, rel=0.1)
    assert found.teacher_token_s == pytest.approx(TRUE.teacher_token_s, rel=0.3), "most of what a teacher has at hand is waiting"
    assert 19 < lengths.response < 23


def test_speeds_scale_with_parameters_over_devices(tmp_path):
    a_run(tmp_path / "run")
    base, _ = plan_from(tmp_path / "run")
    larger, _ = plan_from(tmp_path / "run", student={"path": TEACHER}, learner={"data_parallel": 2})
    ratio = Model.load(TEACHER).parameters / Model.load(STUDENT).parameters
    assert larger.learner_token_s == pytest.approx(base.learner_token_s * ratio / 2)
    assert larger.decode_s == pytest.approx(base.decode_s * ratio) and larger.teacher_token_s == base.teacher_token_s


def test_only_a_finished_synchronous_run_calibrates(tmp_path):
    with pytest.raises(ConfigError, match="is no finished run"):
        plan_from(tmp_path)
    a_run(tmp_path / "late", loop={"batch": 64, "max_lag": 2})
    with pytest.raises(ConfigError, match=r"ran with loop\.max_lag=2; name a run with loop\.max_lag=0"):
        plan_from(tmp_path / "late")
