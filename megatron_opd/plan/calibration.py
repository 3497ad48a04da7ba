"""Speeds from a finished run, so that a plan of the next one rests on this machine and not on a data sheet.

A synchronous run tells learner and publication apart by itself. What decoding and scoring cost is found by simulating that
run until its rollouts and teachers have work at hand as long as they had.
"""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from megatron_opd import config as configs
from megatron_opd import placement
from megatron_opd.config import Config
from megatron_opd.errors import ConfigError
from megatron_opd.plan.costs import Costs
from megatron_opd.plan.gpus import DECODE_BASE
from megatron_opd.plan.lengths import Lengths, lengths_of
from megatron_opd.plan.memory import Model
from megatron_opd.plan.simulation import simulate
from megatron_opd.types import RunSummary

_ROUNDS = 8  # of the search, more than enough
_COLD_STEPS = 2  # at the start, which are slower than all others


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run says of itself."""

    config: Config
    summary: RunSummary
    mean_length: float  # of responses, over its steps
    stage_s: dict[str, float]  # of a step, the median over those that are warm: "train", "publish", and the learner's parts


def read_run(folder: Path) -> Measured:
    """A finished synchronous run.

    Raises:
        ConfigError: it is none.
    """
    try:
        summary = msgspec.json.decode((folder / "summary.json").read_bytes(), type=RunSummary)
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = configs.load(folder / "config.yaml")
        warm = [step["stage_seconds"] | step["seconds"] for step in steps[_COLD_STEPS:] or steps]
        stage_s = {name: statistics.median(step[name] for step in warm) for name in ("train", "publish", "pack", "forward_backward")}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"plan.calibration={folder} is no finished run: {error}") from error
    if config.loop.max_lag:
        raise ConfigError(f"plan.calibration={folder} ran with loop.max_lag={config.loop.max_lag}; name a run with loop.max_lag=0")
    mean_length = statistics.mean(step["mean_length"] for step in steps)
    return Measured(config=config, summary=summary, mean_length=mean_length, stage_s=stage_s)


def calibrated(config: Config, student: Model, teacher: Model | None) -> tuple[Costs, Lengths]:
    """The costs of `config` by the run that `plan.calibration` names, scaled by parameters over devices, and the run's mean length."""
    folder = Path(config.plan.calibration)
    run = read_run(folder)
    lengths = replace(lengths_of(config), response=run.mean_length)
    costs = _fitted(run, replace(lengths_of(run.config), prompt=lengths.prompt, response=run.mean_length, spread=lengths.spread), folder)
    size = student.parameters / Model.load(run.config.student.path).parameters
    teacher_size = teacher.parameters / Model.load(run.config.teacher.path).parameters if teacher and run.config.teacher.path else 0.0
    learning = size * run.config.learner.world_size / config.learner.world_size
    decoding = size * run.config.rollout.tensor_parallel / config.rollout.tensor_parallel
    return replace(
        costs,
        learner_token_s=costs.learner_token_s * learning,
        learner_step_s=costs.learner_step_s * learning,
        teacher_token_s=costs.teacher_token_s * teacher_size * _ranks(run.config) / _ranks(config),
        decode_s=costs.decode_s * decoding,
        decode_sequence_s=costs.decode_sequence_s * decoding,
        publish_s=costs.publish_s * size,
        running=config.rollout.max_running,
    ), lengths


def _ranks(config: Config) -> int:
    return config.teacher.tensor_parallel * config.teacher.pipeline_parallel


def _fitted(run: Measured, lengths: Lengths, folder: Path) -> Costs:
    config, summary, steps = run.config, run.summary, run.summary.steps
    tokens = summary.tokens / steps + config.loop.batch * lengths.prompt
    by_token = run.stage_s["pack"] + run.stage_s["forward_backward"]
    sampling_s = summary.busy_seconds["rollout"] / steps / config.rollout.replicas
    scoring_s = summary.busy_seconds["teacher"] / steps / config.teacher.replicas
    sequence_s = sampling_s / (run.mean_length * (DECODE_BASE + config.loop.batch / config.rollout.replicas))
    costs = Costs(
        learner_token_s=by_token / tokens,
        learner_step_s=run.stage_s["train"] - by_token,
        teacher_token_s=scoring_s * config.teacher.replicas / tokens,
        decode_s=sequence_s * DECODE_BASE,
        decode_sequence_s=sequence_s,
        prefill_token_s=0.0,  # in what a decoding step takes
        publish_s=run.stage_s["publish"],
        running=config.rollout.max_running,
    )
    processes = placement.load(folder)
    for _ in range(_ROUNDS):
        found = simulate(config, processes, costs, lengths, 0)
        sampled, scored = (found.outstanding.get(role, 0.0) * found.step_s for role in ("rollout", "teacher"))
        decoding = sampling_s / sampled if sampled else 0.0
        longer_s = (scoring_s - scored) * config.teacher.replicas
        costs = replace(
            costs,
            decode_s=costs.decode_s * decoding,
            decode_sequence_s=costs.decode_sequence_s * decoding,
            teacher_token_s=max(costs.teacher_token_s / 2, costs.teacher_token_s + longer_s / tokens),
        )
    return costs
