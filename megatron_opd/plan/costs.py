"""Seconds of work by stage, from the table of a GPU. It knows nothing of waiting."""

from dataclasses import dataclass

from megatron_opd.config import Config
from megatron_opd.errors import ConfigError
from megatron_opd.plan import gpus
from megatron_opd.plan.lengths import lengths_of
from megatron_opd.plan.memory import BYTES, Model
from megatron_opd.types import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one learner, one teacher replica and one rollout replica."""

    learner_token_s: float  # per token, prompts included
    learner_step_s: float  # per optimizer step, whatever its tokens
    teacher_token_s: float  # per token, prompts included
    decode_s: float  # per decoding step, whatever decodes
    decode_sequence_s: float  # per decoding step and sequence
    prefill_token_s: float
    publish_s: float
    running: int  # sequences that a replica decodes at a time


def payload_bytes(needs: Needs, teacher: Model | None) -> int:
    """Bytes that a teacher sends per response token; see types.TeacherScores."""
    hidden = 2 * teacher.arch.hidden if needs.divergence and teacher is not None else 0
    scores = needs.teacher_token + needs.teacher_head * needs.head + needs.head_rest + needs.teacher_draws * needs.draws
    return 4 * scores + 8 * needs.teacher_top + hidden + 8 * needs.moments


def costs_of(config: Config, student: Model, teacher: Model | None) -> Costs:
    """From the table of GPUs.

    Raises:
        ConfigError: a CPU run; the table knows GPUs only.
    """
    if config.run.device == "cpu":
        raise ConfigError(
            "run.device=cpu has no table of speeds; set plan.calibration to the directory of a finished run with loop.max_lag=0"
        )
    gpu, learner, rollout, lengths = gpus.GPUS[config.cluster.gpu], config.learner, config.rollout, lengths_of(config)
    context, arch = lengths.prompt + lengths.response, student.arch
    passes = 4 if learner.recompute else 3  # in forward passes
    flops = _forward_flops(student, context)
    micro_batches = max(1.0, config.loop.batch * context / (learner.data_parallel * learner.micro_batch_tokens))
    bubble = 1 + (learner.pipeline_parallel - 1) / micro_batches
    shard = student.parameters / (learner.tensor_parallel * learner.pipeline_parallel)
    link = (gpu.network_bytes_s if learner.world_size > config.cluster.gpus_per_node else gpu.nvlink_bytes_s) * gpus.LINK_SHARE
    reduced = shard * (4 + BYTES[learner.dtype]) / link if learner.data_parallel > 1 else 0.0  # gradients there, weights back
    updated = shard / learner.data_parallel * 2 * 16 / gpu.memory_bytes_s  # master, gradient, two moments: read and written
    weights = student.parameters * BYTES[rollout.dtype]
    bandwidth = rollout.tensor_parallel * gpu.memory_bytes_s * gpus.DECODE_SHARE
    compute = rollout.tensor_parallel * gpu.flops * gpus.FORWARD_SHARE
    kv_bytes = student.kv_values * BYTES[rollout.dtype]
    seats = int(rollout.kv_cache_bytes * rollout.tensor_parallel / (kv_bytes * context))
    apart = config.cluster.nodes > 1 and not config.run.colocated
    teacher_devices = config.teacher.tensor_parallel * config.teacher.pipeline_parallel
    return Costs(
        learner_token_s=passes * flops * bubble / (learner.world_size * gpu.flops * gpus.TRAIN_SHARE),
        learner_step_s=reduced + updated,
        teacher_token_s=_forward_flops(teacher, context) / (teacher_devices * gpu.flops * gpus.FORWARD_SHARE) if teacher else 0.0,
        decode_s=weights / bandwidth + arch.layers * gpus.DECODE_LAYER_S,
        decode_sequence_s=kv_bytes * (lengths.prompt + lengths.response / 2) / bandwidth + flops / compute,
        prefill_token_s=flops / compute,
        publish_s=weights / ((gpu.network_bytes_s if apart else gpu.nvlink_bytes_s) * gpus.LINK_SHARE) + gpus.PAUSE_S,
        running=max(1, min(rollout.max_running, seats)),
    )


def _forward_flops(model: Model, context: float) -> float:
    """Of one token: two per parameter that it is multiplied with, and the attention to half of the context on average."""
    embedding = 0 if model.arch.tied else model.arch.vocab * model.arch.hidden
    attention = 4 * model.arch.layers * model.arch.heads * model.arch.head_dim * context / 2
    return 2 * (model.active_parameters - embedding) + attention
