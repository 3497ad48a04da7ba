"""Does it fit, how fast will it be, what holds it up, and how should the GPUs be divided? No GPU is needed to know."""

import itertools
from dataclasses import dataclass, replace

from megatron_opd.config import Config
from megatron_opd.placement import Process, cluster_resources, place
from megatron_opd.plan.calibration import calibrated
from megatron_opd.plan.costs import Costs, costs_of, payload_bytes
from megatron_opd.plan.lengths import Lengths, lengths_of
from megatron_opd.plan.memory import Memory, Model, limit_of, memory_of, require_fit
from megatron_opd.plan.simulation import Outcome, simulate
from megatron_opd.preflight import build_estimator, check_configs, needs_of
from megatron_opd.types import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What can be known of a run before it."""

    memory: dict[str, Memory]  # role -> component -> bytes on its fullest device
    limit_bytes: float  # of a device
    payload_bytes: int  # of the teacher, per response token
    costs: Costs
    lengths: Lengths
    outcomes: dict[int, Outcome]  # max_lag -> steady state
    bottleneck: str  # the role that works the greatest share of the time at the run's own max_lag
    split: "Split | None"  # None where speeds come from a run, which says nothing of other sizes, and where roles share GPUs

    def to_json(self) -> dict:
        """The figures under the keys that tools read."""
        return {
            "fits": True,  # what does not is refused
            "roles": {role: {"memory_bytes": {name: int(size) for name, size in parts.items()}} for role, parts in self.memory.items()},
            "step_seconds": {str(lag): outcome.step_s for lag, outcome in self.outcomes.items()},
            "tokens_per_second": {str(lag): outcome.tokens_s for lag, outcome in self.outcomes.items()},
            "busy": {str(lag): outcome.busy for lag, outcome in self.outcomes.items()},
            "teacher_payload_bytes_per_token": self.payload_bytes,
            "bottleneck": self.bottleneck,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The division of the same GPUs that makes the slowest role fastest, at the parallel sizes given."""

    learner_data_parallel: int
    rollout_replicas: int
    teacher_replicas: int
    step_s: float  # of the slowest role, were none ever to wait


def make_plan(config: Config) -> Plan:
    """All of it, from config.json files and settings.

    Raises:
        ConfigError: what `check_configs` and placement refuse, a role that does not fit its GPU, an unknown GPU.
    """
    check_configs(config)
    needs = build_estimator(config).needs
    processes = place(config, cluster_resources(config), generation=needs.generation)
    student = Model.load(config.student.path)
    teacher = Model.load(config.teacher.path) if config.teacher.backend != "none" else None
    memory = memory_of(config, needs, student, teacher)
    require_fit(config, needs, student, teacher, memory)
    if config.plan.calibration:
        costs, lengths = calibrated(config, student, teacher)
    else:
        costs, lengths = costs_of(config, student, teacher), lengths_of(config)
    outcomes = {lag: simulate(config, processes, costs, lengths, lag) for lag in sorted({0, 1, 2, 4, config.loop.max_lag})}
    busy = outcomes[config.loop.max_lag].busy
    return Plan(
        memory=memory,
        limit_bytes=limit_of(config),
        payload_bytes=payload_bytes(needs_of(config), teacher),
        costs=costs,
        lengths=lengths,
        outcomes=outcomes,
        bottleneck=max(busy, key=lambda role: busy[role]),
        split=None if config.plan.calibration or config.run.colocated else _best_split(config, needs, processes, student, teacher),
    )


def stage_seconds(config: Config, costs: Costs, lengths: Lengths) -> dict[str, float]:
    """Seconds of a role for one batch, were it never to wait."""
    batch, tokens = config.loop.batch, config.loop.batch * (lengths.prompt + lengths.response)
    step_s = costs.decode_s + costs.running * costs.decode_sequence_s
    found = {"learner": costs.learner_step_s + tokens * costs.learner_token_s}
    decoded = batch * lengths.response / costs.running * step_s + batch * lengths.prompt * costs.prefill_token_s
    found["rollout"] = decoded / config.rollout.replicas
    if costs.teacher_token_s:
        found["teacher"] = tokens * costs.teacher_token_s / config.teacher.replicas
    return found | {"publish": costs.publish_s}


def _best_split(config: Config, needs: Needs, processes: tuple[Process, ...], student: Model, teacher: Model | None) -> Split | None:
    """Every division of the GPUs in use; sizes of a replica stay as they are, so that each of them is known to fit."""
    learner, lengths = config.learner, lengths_of(config)
    total = sum(len(process.devices) for process in processes)
    unit = learner.tensor_parallel * learner.pipeline_parallel
    widths = config.rollout.tensor_parallel, config.teacher.tensor_parallel * config.teacher.pipeline_parallel
    best: Split | None = None
    teachers = range(1, total // widths[1] + 1) if teacher is not None else [0]
    for data, scorers in itertools.product(range(1, total // unit + 1), teachers):
        replicas = (total - data * unit - scorers * widths[1]) // widths[0]
        if replicas < 1 or config.loop.batch < data or data % learner.expert_parallel:
            continue
        changed = replace(
            config,
            learner=replace(learner, data_parallel=data),
            rollout=replace(config.rollout, replicas=replicas),
            teacher=replace(config.teacher, replicas=max(1, scorers)),
        )
        slowest = max(stage_seconds(changed, costs_of(changed, student, teacher), lengths).values())
        if best is None or slowest < best.step_s:
            best = Split(learner_data_parallel=data, rollout_replicas=replicas, teacher_replicas=scorers, step_s=slowest)
    return best
