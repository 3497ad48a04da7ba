"""Every setting, its default and its checks. OmegaConf merges YAML and overrides into these frozen dataclasses.

A section checks itself in `__post_init__`; `Config` checks what lies between sections. Nothing here imports a guest.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from megatron_opd.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value > 0, f"{section}.{name}={value} must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and on what."""

    dir: str = "runs/default"  # logs, metrics, keys, exports; must be new or empty
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    colocated: bool = False  # True: learner and rollout share processes and devices, in turns; weights never leave them
    host: str = "127.0.0.1"  # address that roles bind to and are reached at; on several nodes each has its own
    port: int = 0  # of the controller; 0 picks a free one
    start_timeout_s: float = 180.0  # for all roles to report in
    peer_timeout_s: float = 600.0  # for any single answer: a training step, a score, a weight update

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"run.port={self.port} must lie in 0..65535; 0 picks a free one")
        _positive("run", self, "start_timeout_s", "peer_timeout_s")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that is trained: a Hugging Face folder (config.json, safetensors, tokenizer)."""

    path: str = MISSING


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts: JSON lines."""

    prompts: str = MISSING  # file with one JSON object per line
    prompt_field: str = "prompt"
    completion_field: str = "completion"  # read by estimators that train on given completions only
    chat_template: bool = False  # wrap the prompt as one user message with the tokenizer's template
    max_prompt_tokens: int = 1024  # a longer prompt is an error that names its line
    shuffle: bool = True  # anew in each epoch, from run.seed

    def __post_init__(self) -> None:
        _positive("data", self, "max_prompt_tokens")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """vLLM replicas that sample from the student."""

    replicas: int = 1
    tensor_parallel: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = 256
    piece_tokens: int = 0  # a response is journaled every so many tokens, and goes on from there if interrupted; 0: starts again
    max_running: int = 64  # requests that one replica decodes at a time
    kv_cache_bytes: int = 256 << 20  # per replica and worker
    keep_kv: bool = False  # True: running requests keep the KV cache of old weights; False: they are re-prefilled
    timeout_s: float = 600.0  # a replica that has prompts and finishes none for so long hangs
    cores: tuple[int, ...] = ()  # CPU core of replica 0, 1, ..., counted among those usable; () leaves it to the system

    def __post_init__(self) -> None:
        _positive(
            "rollout",
            self,
            "replicas",
            "tensor_parallel",
            "temperature",
            "max_response_tokens",
            "max_running",
            "kv_cache_bytes",
            "timeout_s",
        )
        _require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p} must lie in (0, 1]")
        _require(self.piece_tokens >= 0, f"rollout.piece_tokens={self.piece_tokens} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model whose log-probabilities are the training signal."""

    backend: Literal["megatron", "vllm", "none"] = "megatron"
    path: str = ""
    replicas: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_tokens: int = 8192  # scored together at most, prompts included
    gather_s: float = 0.0  # wait after a first rollout for more to score with it: spares a device that others share
    kv_cache_bytes: int = 256 << 20  # backend vllm only
    cores: tuple[int, ...] = ()  # CPU cores of rank 0, 1, ... over all replicas

    def __post_init__(self) -> None:
        _positive("teacher", self, "replicas", "tensor_parallel", "pipeline_parallel", "batch_tokens", "kv_cache_bytes")
        _require(self.gather_s >= 0, f"teacher.gather_s={self.gather_s} must be 0 or more")
        _require(
            self.backend != "vllm" or self.pipeline_parallel == 1,
            f"teacher.pipeline_parallel={self.pipeline_parallel} needs teacher.backend=megatron",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-5  # nats^-1: the peak
    min_lr_ratio: float = 0.0  # final learning rate over the peak, unless decay is constant
    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # global norm; 0 switches clipping off

    def __post_init__(self) -> None:
        _positive("learner.optimizer", self, "lr", "eps")
        for name in ("warmup_steps", "clip_grad", "weight_decay"):
            _require(getattr(self, name) >= 0, f"learner.optimizer.{name}={getattr(self, name)} must be 0 or more")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"learner.optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        _require(0 <= self.min_lr_ratio <= 1, f"learner.optimizer.min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class FP8Config:
    """TransformerEngine's FP8 in the learner; on a CPU the head's products are emulated, bit by bit in what is rounded."""

    logits: Literal["bf16", "fp8x2", "fp8"] = "bf16"  # of learner.kernels=te, whose gradients are FP8 always; fp8 can drown a small KL
    recipe: Literal["current", "delayed", "blockwise", "mxfp8"] = "current"  # mxfp8 wants Blackwell, blockwise Hopper and CUDA 12.9
    noise_every: int = 20  # measures what FP8 logits add to the KL, KL(p_fp8 || p_bf16), once in so many steps; 0: never
    body: bool = False  # the transformer layers too, by Megatron's own settings; run.device=cuda only

    def __post_init__(self) -> None:
        _require(self.noise_every >= 0, f"learner.fp8.noise_every={self.noise_every} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The Megatron-Core learner."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    pipeline_layers: tuple[int, ...] = ()  # of each pipeline stage; (): as even as they get, fewest on the last, then on the first
    data_parallel: int = 1
    expert_parallel: int = 1  # of the data-parallel ranks, how many share one set of experts, each holding its part
    sequence_parallel: bool = False
    dtype: Literal["bfloat16", "float32"] = "float32"  # of weights and activations; masters are float32
    micro_batch_tokens: int = 4096  # packed inputs per micro-batch; one longer sequence makes a micro-batch of its own
    recompute: bool = False  # full activation recompute, layer by layer
    kernels: Literal["auto", "reference", "chunked", "triton", "te"] = "auto"  # what computes from the LM head: examples/KERNELS.md
    schedule: Literal["forward", "recompute"] = "forward"  # dense_kl's gradients: beside its logits, or later from new ones
    fp8: FP8Config = field(default_factory=FP8Config)
    logps_chunk_tokens: int = 1024  # rows of logits that exist at a time
    moments: bool = True  # entropies of student and teacher and the agreement of their arg-maxes, every step
    bucket_bytes: int = 64 << 20  # of weight streaming
    weight_delta: bool = False  # True: both ends of it keep the last weights, and only what changed travels
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    cores: tuple[int, ...] = ()  # CPU cores of rank 0, 1, ...

    def __post_init__(self) -> None:
        _positive(
            "learner",
            self,
            "tensor_parallel",
            "pipeline_parallel",
            "data_parallel",
            "expert_parallel",
            "micro_batch_tokens",
            "logps_chunk_tokens",
            "bucket_bytes",
        )
        _require(
            self.data_parallel % self.expert_parallel == 0,
            f"learner.expert_parallel={self.expert_parallel} does not divide learner.data_parallel={self.data_parallel}, whose ranks share "
            "the experts; make it divide",
        )
        _require(
            self.kernels == "te" or self.fp8.logits == "bf16",
            f"learner.fp8.logits={self.fp8.logits} is what learner.kernels=te does, not {self.kernels}; set learner.kernels=te",
        )
        _require(
            not self.fp8.body or self.dtype == "bfloat16",
            f"learner.fp8.body=true wants learner.dtype=bfloat16, not {self.dtype}",
        )
        _require(
            not self.sequence_parallel or self.tensor_parallel > 1,
            "learner.sequence_parallel=true splits tokens over the tensor-parallel ranks; set learner.tensor_parallel > 1 or switch it off",
        )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """The objective, by registry name or as `package.module:Class`, and its own settings."""

    name: str = "forward_kl_topk"
    settings: dict[str, Any] = field(default_factory=dict)  # fields of the estimator's dataclass
    weight: float = 1.0
    plus: str = ""  # a second estimator whose weighted loss is added
    plus_settings: dict[str, Any] = field(default_factory=dict)
    plus_weight: float = 1.0

    def __post_init__(self) -> None:
        _positive("estimator", self, "weight", "plus_weight")
        _require(
            bool(self.plus) or not self.plus_settings, "estimator.plus_settings are given but estimator.plus is empty; name the second"
        )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """When things happen."""

    steps: int = 100  # optimizer steps
    batch: int = 64  # prompts per optimizer step
    max_lag: int = 1  # hard bound in optimizer steps; 0 is strictly synchronous
    exact_lag: bool = False  # True: train every batch exactly max_lag steps after it was generated, save the first max_lag ones
    store_bytes: int = 8 << 30  # trajectories that wait; past that only prompts of the next step are started
    export_every: int = 0  # writes the student as a Hugging Face folder hf-STEP every so many steps; 0: at the end only

    def __post_init__(self) -> None:
        _positive("loop", self, "steps", "batch", "store_bytes")
        _require(self.max_lag >= 0, f"loop.max_lag={self.max_lag} must be 0 or more")
        _require(self.export_every >= 0, f"loop.export_every={self.export_every} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What `train --resume` goes on from: checkpoints in the run directory, and a journal of what was paid for since the last one."""

    every_steps: int = 50  # and behind the last step; 0: only there, and when the run is asked to stop
    keep: int = 2  # the last so many
    keep_every: int = 0  # and those whose step is a multiple of this, for ever
    keep_best: int = 0  # and so many whose own step had the best `best_by`
    best_by: str = "loss"  # or a diagnostic: the highest agreement, support_mass or effective_samples, the lowest of any other
    time_limit_s: float = 0.0  # of a `train`; 0: until the end of the SLURM job around it, if any. `launch slurm` has slurm.signal_s
    before_limit_s: float = 300.0  # so long before that limit the run saves and ends, to be resumed; more than one step takes
    journal: Literal["off", "process", "step", "record"] = "step"  # survives a dead process; machine, by step; machine, each record

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "keep")
        for name in ("every_steps", "keep_every", "keep_best", "time_limit_s", "before_limit_s"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name}={getattr(self, name)} must be 0 or more")
        _require(
            not self.time_limit_s or self.time_limit_s > self.before_limit_s,
            f"checkpoint.time_limit_s={self.time_limit_s:g} leaves no time before checkpoint.before_limit_s={self.before_limit_s:g}; "
            "raise the one or lower the other",
        )


@dataclass(frozen=True, kw_only=True)
class SupervisionConfig:
    """What is survived while a run is on. A dead controller is not: `train --resume` goes on from what it left."""

    restarts: int = 5  # of the learner and each replica, all again after ten good minutes; 0, as with loop.exact_lag: a death ends the run
    backoff_s: float = 1.0  # before a replica's first restart, doubled before each further one
    silent_s: float = 30.0  # a process that is stopped or unreachable for so long counts as dead
    disk_wait_s: float = 3600.0  # how long a run waits for room on a full disk

    def __post_init__(self) -> None:
        _positive("supervision", self, "silent_s")
        for name in ("restarts", "backoff_s", "disk_wait_s"):
            _require(getattr(self, name) >= 0, f"supervision.{name}={getattr(self, name)} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a run that goes wrong is stopped, by means over `window` steps. 0 switches a guard off."""

    window: int = 5  # steps
    length_growth: float = 4.0  # mean response length over that of the first window
    support_mass: float = 0.02  # least mass of the student on the ids that are cached, where the estimator reports "support_mass"
    skipped_steps: int = 3  # in a row, for a loss or gradient that is not finite
    set_aside: int = 100  # prompts in the whole run whose rollout or scores cannot be trained on; see quarantine.jsonl

    def __post_init__(self) -> None:
        _positive("guard", self, "window")
        _require(self.length_growth == 0 or self.length_growth > 1, f"guard.length_growth={self.length_growth} must be 0 or more than 1")
        _require(0 <= self.support_mass < 1, f"guard.support_mass={self.support_mass} must lie in [0, 1)")
        for name in ("skipped_steps", "set_aside"):
            _require(getattr(self, name) >= 0, f"guard.{name}={getattr(self, name)} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What the end of a run measures on held-out prompts: accuracy, and KL with the teacher's q over its own whole vocabulary."""

    prompts: str = ""  # JSON lines; empty: no evaluation
    verifier: str = ""  # `file.py:function` or `package.module:function`, (record, completion) -> 0..1; empty: KL only
    models: tuple[str, ...] = ("before", "after", "teacher")  # some of these: the student twice, and its teacher's accuracy
    limit: int = 0  # first n prompts; 0 means all
    timeout_s: float = 3600.0  # for the whole evaluation
    dtype: Literal["bfloat16", "float32"] = "float32"

    def __post_init__(self) -> None:
        _require(
            bool(self.models) and set(self.models) <= {"before", "after", "teacher"},
            f"eval.models={list(self.models)} must name some of before, after, teacher; to measure nothing, leave eval.prompts empty",
        )
        _require(self.limit >= 0, f"eval.limit={self.limit} must be 0 or more")
        _require(not self.verifier or bool(self.prompts), "eval.verifier is set but eval.prompts is empty; name the held-out prompts")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines that a job gets and which role runs where; `train`, which has one machine, puts all of them there."""

    nodes: int = 1
    gpus_per_node: int = 8  # run.device=cuda only
    gpu: str = "h100"  # a row of the table in megatron_opd/plan/gpus.py, for `plan`
    cores_per_node: int = 0  # run.device=cpu only: dealt out like GPUs, and roles are pinned to theirs; 0: not counted
    learner: tuple[int, ...] = ()  # nodes (0, 1, ...) that this role may use, filled in this order; () allows all
    rollout: tuple[int, ...] = ()
    teacher: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _positive("cluster", self, "nodes", "gpus_per_node")
        _require(self.cores_per_node >= 0, f"cluster.cores_per_node={self.cores_per_node} must be 0 or more")
        for role in ("learner", "rollout", "teacher"):
            wrong = [node for node in getattr(self, role) if not 0 <= node < self.nodes]
            _require(not wrong, f"cluster.{role} names node {wrong}, but cluster.nodes={self.nodes} are numbered from 0")


_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What `megatron-opd launch slurm` asks of SLURM."""

    time: str = ""  # limit of the job in SLURM's notation, e.g. 24:00:00; `launch slurm` refuses to go without
    job_name: str = "megatron-opd"
    options: tuple[str, ...] = ()  # further #SBATCH lines, e.g. --partition=gpu, --gres=gpu:8, --account=me
    hetjob_options: tuple[str, ...] = ()  # of a second component with the nodes that no learner runs on; () makes one job of all
    signal_s: int = 300  # before the limit: the controller is told to save and to end
    requeue: bool = True  # when preempted, when a node fails, and after the signal
    setup: str = ""  # shell lines that come before the steps, e.g. module load cuda
    container_image: str = ""  # pyxis: the steps run in it and find `megatron-opd` on its PATH; "" runs this installation
    container_mounts: str = ""  # pyxis: SOURCE:TARGET,...; run.dir and the model folders must be among them

    def __post_init__(self) -> None:
        _require(not self.time or bool(_TIME.fullmatch(self.time)), f"slurm.time={self.time} is no time limit; write e.g. 24:00:00")
        _positive("slurm", self, "signal_s")
        _require(not self.container_mounts or bool(self.container_image), "slurm.container_mounts needs slurm.container_image")
        for option in (*self.options, *self.hetjob_options):
            _require(option.startswith("-") and "\n" not in option, f"slurm option {option!r} is not of the form --name=value")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `megatron-opd plan` assumes of the workload, and from which run it takes its speeds."""

    prompt_tokens: int = 0  # mean; 0: half of data.max_prompt_tokens
    response_tokens: int = 0  # mean before the cut at rollout.max_response_tokens; 0: half of that
    spread: float = 0.6  # standard deviation of the logarithm of a response's length
    steps: int = 12  # simulated for each lag at least, once the loop is steady
    calibration: str = ""  # directory of a finished run with loop.max_lag=0, whose speeds replace those of the table

    def __post_init__(self) -> None:
        _positive("plan", self, "steps")
        for name in ("prompt_tokens", "response_tokens", "spread"):
            _require(getattr(self, name) >= 0, f"plan.{name}={getattr(self, name)} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    run: RunConfig = field(default_factory=RunConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def restarts(self) -> int:
        """How often a rollout or teacher replica is replaced; a new one could not sample from the older weights of an exact lag."""
        return 0 if self.loop.exact_lag else self.supervision.restarts

    @property
    def replaces_learner(self) -> bool:
        """Whether a new learner goes on from the last checkpoint and the journal while all other roles stay.

        On several nodes nobody sees all of its ranks end; colocated, the rollout ends with it.
        """
        return self.restarts > 0 and self.cluster.nodes == 1 and not self.run.colocated and self.checkpoint.journal != "off"

    def __post_init__(self) -> None:
        _require(
            not self.learner.fp8.body or self.run.device == "cuda",
            "learner.fp8.body=true needs TransformerEngine's layers; set run.device=cuda or switch it off",
        )
        _require(
            self.teacher.backend == "none" or bool(self.teacher.path),
            "teacher.path is missing; name a Hugging Face folder or set teacher.backend=none",
        )
        ranks, width = self.learner.world_size, self.rollout.tensor_parallel
        _require(
            not self.run.colocated or (self.rollout.replicas == 1 and width == ranks),
            f"run.colocated=true wants one rollout engine over all {ranks} learner ranks, got rollout.replicas={self.rollout.replicas} and "
            f"rollout.tensor_parallel={width}; set rollout.replicas=1 and rollout.tensor_parallel={ranks}",
        )
        _require(
            not self.run.colocated or not self.rollout.piece_tokens,
            f"run.colocated=true samples whole responses; set rollout.piece_tokens=0, not {self.rollout.piece_tokens}",
        )
        _require(
            not self.run.colocated or not self.rollout.cores, "run.colocated=true gives rollouts the learner's cores; set rollout.cores=[]"
        )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and `key=value` overrides.

    Raises:
        ConfigError: unknown key (with the nearest right one), wrong type, missing value, or a failed check.
    """
    for override in overrides:
        _require("=" in override, f"override {override!r} is not of the form key=value")
    try:
        words = [f'{override}""' if override.endswith("=") else override for override in overrides]  # key= empties a text
        given, changes = OmegaConf.load(path), OmegaConf.from_dotlist(words)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"config file {path} or an override of it cannot be read: {error}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"config file {path} must hold a mapping of sections, got {type(given).__name__}")
    return resolve(given, changes)


def resolve(*layers: DictConfig) -> Config:
    """Merges layers over the defaults, the last one winning, and checks the whole.

    Raises:
        ConfigError: see `load`.
    """
    try:
        for layer in layers:
            _check_keys(layer, Config, "")
        merged = OmegaConf.merge(OmegaConf.structured(Config), *layers)
        missing = OmegaConf.missing_keys(merged)
        _require(not missing, f"no value for {', '.join(sorted(missing))}; set it in the YAML file or as key=value")
        return OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"no value for {error.full_key}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}") from error


def to_yaml(config: Config) -> str:
    """The whole resolved config, loadable by `load`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


_FIXED = (
    "student.path", "data", "estimator", "run.seed", "teacher.backend", "teacher.path", "teacher.dtype", "learner.moments", "loop.batch",
    "loop.max_lag", "loop.exact_lag", "rollout.temperature", "rollout.top_p", "rollout.max_response_tokens", "rollout.dtype",
)  # fmt: skip


def fixed(config: Config) -> dict[str, Any]:
    """The settings that a run keeps from its first step to its last; all others may change when it is resumed."""
    settings = OmegaConf.structured(config)
    return {name: OmegaConf.to_container(OmegaConf.create({"it": OmegaConf.select(settings, name)}))["it"] for name in _FIXED}


def _check_keys(given: DictConfig, schema: type, prefix: str) -> None:
    known = {f.name: f for f in fields(schema)}
    for key in given:
        if key not in known:
            own = [f"estimator.settings.{key}"] if prefix == "estimator." else _elsewhere(str(key))
            near = difflib.get_close_matches(str(key), known, n=1) or own
            hint = f"did you mean {prefix}{near[0]}?" if near and near[0] in known else f"did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown setting {prefix}{key}; {hint or 'known: ' + ', '.join(known)}")
        section = known[key].default_factory
        if is_dataclass(section):
            value = given._get_node(key)
            _require(isinstance(value, DictConfig), f"{prefix}{key} is a section of settings, got {value}")
            _check_keys(value, section, f"{prefix}{key}.")


def _elsewhere(key: str) -> list[str]:
    """Full names of settings in any section whose last part is close to `key`."""
    names: dict[str, str] = {}

    def collect(schema: type, prefix: str) -> None:
        for setting in fields(schema):
            names.setdefault(setting.name, f"{prefix}{setting.name}")
            if is_dataclass(setting.default_factory):
                collect(setting.default_factory, f"{prefix}{setting.name}.")

    collect(Config, "")
    return [names[near] for near in difflib.get_close_matches(key, names, n=1)]
