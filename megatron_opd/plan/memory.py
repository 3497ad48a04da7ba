"""Bytes on the fullest device of each role, by component. It counts parameters with Megatron itself; the rest is arithmetic.

Dimension key, as in names: D hidden, F feed-forward, V vocabulary, T tokens of a micro-batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from megatron_opd.config import Config, LearnerConfig
from megatron_opd.errors import ConfigError, DoesNotFitError
from megatron_opd.model.count import StageCount, count_stages
from megatron_opd.model.parallel import ParallelConfig
from megatron_opd.plan.gpus import CPU_ACTIVATION_COPIES, CPU_RESERVE_BYTES, GPU_RESERVE_BYTES, GPUS, KERNEL_COPIES
from megatron_opd.plan.lengths import lengths_of
from megatron_opd.preflight import load_hf_config
from megatron_opd.types import Needs
from megatron_opd.weights.architectures import Architecture, architecture

BYTES = {"bfloat16": 2, "float32": 4}
_TEACHER_CHUNK = 1024  # tokens whose logits a Megatron teacher holds at a time
_VLLM_BATCH_TOKENS = 8192  # of a prefill; vLLM's own default for large devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model and what `plan` asks of it again and again."""

    hf_config: PretrainedConfig
    arch: Architecture
    counted: dict[tuple, list[StageCount]] = field(default_factory=dict)  # by what decides which parameters a rank has

    @classmethod
    def load(cls, path: str) -> "Model":
        """Reads config.json alone."""
        hf_config = load_hf_config(path)
        return cls(hf_config=hf_config, arch=architecture(hf_config))

    def stages(self, split: ParallelConfig) -> list[StageCount]:
        """Counted on the whole world of the first split of these sizes; more replicas hold the same."""
        key = split.tensor, split.pipeline, split.layers, split.expert
        if key not in self.counted:
            self.counted[key] = count_stages(self.hf_config, split)
        return self.counted[key]

    @property
    def parameters(self) -> int:
        """In all."""
        return self.stages(ParallelConfig())[0].parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: of the experts only a few."""
        idle = self.arch.experts.count - self.arch.experts.active if self.arch.experts else 0
        return self.parameters - self.arch.layers * idle * 3 * self.arch.hidden * self.arch.ffn

    @property
    def kv_values(self) -> int:
        """Of one token, over all layers."""
        return 2 * self.arch.layers * self.arch.groups * self.arch.head_dim


Memory = dict[str, float]  # component -> bytes


def memory_of(config: Config, needs: Needs, student: Model, teacher: Model | None) -> dict[str, Memory]:
    """Role -> component -> bytes on its fullest device. On a CPU, roles have no device of their own: bytes of a process.

    Where learner and rollout share devices, "learner" is a training turn, "rollout" a sampling turn, and "hand_over" the moment
    between them, when both hold their weights and the first rank all tensors in full.
    """
    reserve = GPU_RESERVE_BYTES if config.run.device == "cuda" else CPU_RESERVE_BYTES
    found = {"learner": learner_memory(config, config.learner, needs, student, teacher)}
    if needs.generation:
        found["rollout"] = _engine(student, config.rollout.dtype, config.rollout.tensor_parallel, config.rollout.kv_cache_bytes)
        found["rollout"] |= {"sync": _sync(config, student), "next_weights": found["rollout"]["weights"]}  # staged beside those that sample
        if config.run.colocated:
            trained = {name: found["learner"][name] for name in ("weights", "gradients", "optimizer")}
            found["learner"]["sync"] = 0.0
            found["rollout"] |= {"sync": 0.0, "next_weights": 0.0, "learner_weights": trained["weights"]}
            whole = student.parameters * BYTES[config.rollout.dtype]
            found["hand_over"] = trained | {"rollout_weights": 2 * found["rollout"]["weights"], "sync": whole}  # old and new
    if teacher is not None and config.teacher.backend == "vllm":
        found["teacher"] = _engine(teacher, config.teacher.dtype, config.teacher.tensor_parallel, config.teacher.kv_cache_bytes)
    elif teacher is not None:
        found["teacher"] = _scorer(config, teacher)
    return {role: components | {"reserve": reserve} for role, components in found.items()}


def learner_memory(config: Config, settings: LearnerConfig, needs: Needs, student: Model, teacher: Model | None) -> Memory:
    """Of the fullest rank."""
    split = ParallelConfig(
        tensor=settings.tensor_parallel,
        pipeline=settings.pipeline_parallel,
        layers=settings.pipeline_layers,
        data=settings.data_parallel,
        expert=settings.expert_parallel,
        sequence_parallel=settings.sequence_parallel,
    )
    stages = student.stages(split)
    return max((_stage(config, settings, needs, student, teacher, stage) for stage in stages), key=lambda parts: sum(parts.values()))


def _stage(config: Config, settings: LearnerConfig, needs: Needs, student: Model, teacher: Model | None, stage: StageCount) -> Memory:
    width, tensor = BYTES[settings.dtype], settings.tensor_parallel
    last = stage.stage == settings.pipeline_parallel - 1
    tokens = _micro_batch(config, settings)
    chunk = min(settings.logps_chunk_tokens, tokens)
    rows = chunk * student.arch.vocab / tensor * 4 * KERNEL_COPIES if last else 0.0
    if last and needs.divergence and teacher is not None:  # its LM head, and its logits beside the student's
        rows = 2 * rows + teacher.arch.hidden * teacher.arch.vocab / tensor * BYTES[config.teacher.dtype]
    copies = CPU_ACTIVATION_COPIES if config.run.device == "cpu" else 1
    optimized = (stage.parameters + (settings.expert_parallel - 1) * stage.expert_parameters) / settings.data_parallel
    return {
        "weights": stage.parameters * width,
        "gradients": stage.parameters * 4,  # float32, one buffer
        "optimizer": optimized * (12 if width == 2 else 8),  # two moments; a master where weights are not
        "activations": _activations(settings, student.arch, stage, tokens) * width * copies,
        "kl_workspace": rows,
        "sync": _sync(config, student),
    }


def _micro_batch(config: Config, settings: LearnerConfig) -> float:
    """Tokens of the largest one: as many as are allowed, or all that a data-parallel rank has; a longer sequence makes its own."""
    lengths = lengths_of(config)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return max(longest, min(settings.micro_batch_tokens, config.loop.batch * (lengths.prompt + lengths.response) / settings.data_parallel))


def _activations(settings: LearnerConfig, arch: Architecture, stage: StageCount, tokens: float) -> float:
    """Values that a backward pass needs: those of Korthikanti et al. (arXiv:2205.05198), counted for GQA, SwiGLU and an
    attention that keeps no score matrix. 1F1B keeps pipeline - stage micro-batches."""
    tensor = settings.tensor_parallel
    spread = tensor if settings.sequence_parallel else 1
    residual = arch.hidden / spread
    query, key = arch.heads * arch.head_dim / tensor, arch.groups * arch.head_dim / tensor
    layer = 4 * residual + 3 * query + 3 * key + 4 * arch.ffn_per_token / tensor
    in_flight = settings.pipeline_parallel - stage.stage
    kept = residual if settings.recompute else layer
    return tokens * (in_flight * stage.layers * kept + (layer if settings.recompute else 0) + 2 * residual)


def _engine(model: Model, dtype: str, tensor: int, kv_cache_bytes: int) -> Memory:
    """One worker of a vLLM replica; a prefill's values and the logits of what it samples."""
    (stage,) = model.stages(ParallelConfig(tensor=tensor))
    values = _VLLM_BATCH_TOKENS * (2 * model.arch.hidden + 3 * model.arch.ffn_per_token / tensor)
    return {"weights": stage.parameters * BYTES[dtype], "kv_cache": kv_cache_bytes, "activations": values * BYTES[dtype]}


def _scorer(config: Config, teacher: Model) -> Memory:
    settings = config.teacher
    tensor, width, arch = settings.tensor_parallel, BYTES[settings.dtype], teacher.arch
    stages = teacher.stages(ParallelConfig(tensor=tensor, pipeline=settings.pipeline_parallel))
    attention, ffn = (2 * arch.heads + 2 * arch.groups) * arch.head_dim, 3 * arch.ffn_per_token
    values = settings.batch_tokens * (4 * arch.hidden + (attention + ffn) / tensor)
    return {
        "weights": max(stage.parameters for stage in stages) * width,
        "activations": values * width,
        "kl_workspace": _TEACHER_CHUNK * arch.vocab / tensor * 4 * KERNEL_COPIES,
    }


def _sync(config: Config, student: Model) -> float:
    """A bucket and the next one; a tensor travels whole, so a large one makes a bucket of its own, and a small model only one."""
    width, arch = BYTES[config.rollout.dtype], student.arch
    largest = max(config.learner.bucket_bytes, arch.hidden * max(arch.vocab, arch.ffn) * width)
    return 2.0 * min(largest, student.parameters * width)


def require_fit(config: Config, needs: Needs, student: Model, teacher: Model | None, memory: dict[str, Memory]) -> None:
    """Raises DoesNotFitError if a role needs more than its GPU has: the component that breaks it, and the nearest settings that fit."""
    limit = limit_of(config)
    for role, model in (("rollout", student), ("teacher", teacher)):
        if model is not None and "kv_cache" in memory.get(role, ()):
            _require_cache(config, role, model)
    for role, parts in memory.items():
        if sum(parts.values()) > limit:
            remedy = _remedy(config, needs, student, teacher, role, limit)
            components = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
            raise DoesNotFitError(
                f"{role} needs {sum(parts.values()) / 1e9:.1f} GB, a {config.cluster.gpu} has {limit / 1e9:.0f}; most of it is "
                f"{max(parts, key=lambda name: parts[name])} ({components}); {remedy}"
            )


def _require_cache(config: Config, role: str, model: Model) -> None:
    settings, least = getattr(config, role), _least_cache(config, role, model)
    if settings.kv_cache_bytes * settings.tensor_parallel < least:
        raise ConfigError(
            f"{role}.kv_cache_bytes={settings.kv_cache_bytes} on {settings.tensor_parallel} ranks cannot hold one sequence of "
            f"data.max_prompt_tokens + rollout.max_response_tokens; wanted at least {math.ceil(least / settings.tensor_parallel)}"
        )


def limit_of(config: Config) -> float:
    """Bytes that one device has; on a CPU nothing is known of them."""
    if config.run.device == "cpu":
        return float("inf")
    if config.cluster.gpu not in GPUS:
        raise ConfigError(f"cluster.gpu={config.cluster.gpu} is not in the table; use one of {', '.join(GPUS)}")
    return GPUS[config.cluster.gpu].memory_bytes


def _remedy(config: Config, needs: Needs, student: Model, teacher: Model | None, role: str, limit: float) -> str:
    for words, changed in _neighbours(config, role, student, teacher):
        try:
            parts = memory_of(changed, needs, student, teacher)[role]
        except ConfigError:
            continue  # the model does not divide so
        if sum(parts.values()) <= limit:
            return f"nearest settings that fit: {words} ({sum(parts.values()) / 1e9:.1f} GB)"
    return "no setting of this section makes it fit; take a GPU with more memory, or more of them"


def _neighbours(config: Config, role: str, student: Model, teacher: Model | None) -> Iterator[tuple[str, Config]]:
    """Other settings of a role, the least change first: the same GPUs before more of them."""
    if role in ("learner", "hand_over"):
        yield from _learner_neighbours(config)
        return
    settings = getattr(config, role)
    if role == "rollout" or settings.backend == "vllm":
        model = student if role == "rollout" else teacher
        assert model is not None, "there is no teacher role without a teacher"
        least = _least_cache(config, role, model)
        for tensor in (1,) if role == "rollout" and config.run.colocated else (1, 2, 4, 8):
            for share in (1, 2, 4):
                cache = settings.kv_cache_bytes // share
                if cache * settings.tensor_parallel * tensor >= least and (tensor, share) != (1, 1):
                    changes = {"tensor_parallel": settings.tensor_parallel * tensor, "kv_cache_bytes": cache}
                    yield _words(role, settings, changes), replace(config, **{role: replace(settings, **changes)})
    else:
        for pipeline in (1, 2, 4, 8):
            for tensor in (1, 2, 4, 8):
                changes = {"tensor_parallel": settings.tensor_parallel * tensor, "pipeline_parallel": settings.pipeline_parallel * pipeline}
                if tensor * pipeline > 1 and changes["tensor_parallel"] <= config.cluster.gpus_per_node:
                    yield _words(role, settings, changes), replace(config, teacher=replace(settings, **changes))


def _least_cache(config: Config, role: str, model: Model) -> int:
    """Bytes, over all tensor ranks, of the keys and values of the longest sequence."""
    return (config.data.max_prompt_tokens + config.rollout.max_response_tokens) * model.kv_values * BYTES[getattr(config, role).dtype]


def _learner_neighbours(config: Config) -> Iterator[tuple[str, Config]]:
    settings = config.learner
    found: list[tuple[int, dict[str, Any]]] = []
    for more in (1, 2, 4, 8):
        for tensor in (1, 2, 4, 8):
            for pipeline in (1, 2, 4, 8):
                data, rest = divmod(settings.data_parallel * more, tensor * pipeline)
                width = settings.tensor_parallel * tensor
                if rest or data % settings.expert_parallel or width > config.cluster.gpus_per_node:
                    continue
                for recompute in sorted({settings.recompute, True}):
                    for share in (1, 2, 4):
                        changes: dict[str, Any] = {
                            "recompute": recompute,
                            "micro_batch_tokens": settings.micro_batch_tokens // share,
                            "tensor_parallel": width,
                            "pipeline_parallel": settings.pipeline_parallel * pipeline,
                            "pipeline_layers": settings.pipeline_layers if pipeline == 1 else (),
                            "data_parallel": data,
                            "sequence_parallel": settings.sequence_parallel or width > 1,
                        }
                        steps = (recompute != settings.recompute) + share + 3 * (tensor * pipeline) + 20 * more
                        found.append((steps, changes))
    for _, changes in sorted(found, key=lambda pair: pair[0]):
        changed = replace(settings, **changes)
        rollout = replace(config.rollout, tensor_parallel=changed.world_size) if config.run.colocated else config.rollout
        yield _words("learner", settings, changes), replace(config, learner=changed, rollout=rollout)


def _words(role: str, settings: object, changes: dict) -> str:
    return ", ".join(f"{role}.{name}={str(value).lower()}" for name, value in changes.items() if getattr(settings, name) != value)
