"""Everything that crosses a border between rooms. Who reads this file knows the system.

Response-aligned arrays are numpy (they travel between processes as raw buffers); target-aligned tensors are torch (they
live inside the learner). Log-probabilities are natural logarithms. p is the student, q the teacher, b the behaviour
policy: the student version that sampled the token. `None` means "not asked for", never "not yet".

Dimension key: P prompt tokens, R response tokens, K ids per position, m draws per position, M distinct draws of a whole
response, T packed targets, D hidden size, N sequences in a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch


# ---------------------------------------------------------------------------------------------- what is asked for
@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A divergence over the whole vocabulary, in nats. m = weight q + (1 - weight) p."""

    kind: Literal[
        "forward", "reverse", "jsd", "skewed"
    ]  # KL(q||p); KL(p||q); weight KL(q||m) + (1 - weight) KL(p||m); a mix of the two KLs
    weight: float = 0.5  # jsd: beta, in (0, 1); skewed: share of the forward KL, in [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an estimator asks of rollouts and teachers; nothing else is computed, shipped or stored."""

    behaviour_logp: bool = False  # log b of the generated token
    head: int = 0  # K: ids of the K largest b per position, with log b
    draws: int = 0  # m: independent draws per position from b restricted to the ids outside the head (from b itself if head is 0)
    teacher_token: bool = False  # log q of the generated token
    teacher_head: bool = False  # log q at the rollout's head ids
    head_rest: bool = False  # log of the mass of p and of q outside the head ids
    teacher_draws: bool = False  # log q at the draws
    teacher_top: int = 0  # K: ids of the K largest q per position, with log q
    top_rest: bool = False  # log of the mass of p outside those
    divergence: Divergence | None = None  # over the whole vocabulary, from the teacher's hidden states and LM head
    generation: bool = True  # False: the data set's own completions are trained on, nothing is sampled
    moments: bool = False  # entropy and most probable id of the teacher: asked for by the run's diagnostics, not by estimators

    @property
    def teacher(self) -> bool:
        """Whether any teacher is needed at all."""
        return self.teacher_token or self.teacher_head or self.teacher_draws or self.teacher_top > 0 or self.divergence is not None


# ---------------------------------------------------------------------------------------- response-aligned, travels
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt; its index grows for ever and is the resume cursor."""

    index: int  # 0, 1, 2, ... over all epochs: also the order of training
    token_ids: np.ndarray  # [P] int32
    completion_ids: np.ndarray | None = None  # [R] int32, with the end-of-sequence id; for supervised training only
    begun_ids: np.ndarray | None = None  # [R] int32, tokens of its response that are there already: it is to go on behind them

    @property
    def begun(self) -> int:
        """How many tokens of its response are there already."""
        return 0 if self.begun_ids is None else len(self.begun_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of response tokens sampled by one policy version; it ends where the next one starts."""

    first_token: int  # offset in the response
    version: int  # number of optimizer steps behind the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A response and what the sampler knew while it was drawn. A piece of one has the tokens behind `Prompt.begun_ids` only."""

    index: int
    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray  # [R] int32, includes the end-of-sequence id when finish_reason is "stop"
    logp: np.ndarray | None = None  # [R] float32, log b(token) of the distribution that was sampled from
    head_ids: np.ndarray | None = None  # [R, K] int32, distinct, by falling b
    head_logp: np.ndarray | None = None  # [R, K] float32, log b
    draw_ids: np.ndarray | None = None  # [M] int32, never in the head, distinct within a position; position after position
    draw_counts: np.ndarray | None = None  # [M] int32, how often each was drawn: m in sum for every position
    draw_sizes: np.ndarray | None = None  # [R] int32, distinct draws of each position: M in sum
    draw_logp: np.ndarray | None = None  # [M] float32, log b over the *whole* vocabulary
    segments: tuple[Segment, ...]  # at least one; the first starts at token 0, that of a piece where the piece does
    finish_reason: str  # "stop" | "length" | "unfinished": it has reached rollout.piece_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """Teacher log-probabilities at the positions of one response."""

    index: int
    token_logp: np.ndarray | None = None  # [R] float32, log q(token)
    head_logp: np.ndarray | None = None  # [R, K] float32, log q at Rollout.head_ids
    head_log_rest: np.ndarray | None = None  # [R] float32, log of the mass of q outside Rollout.head_ids
    draw_logp: np.ndarray | None = None  # [M] float32, log q at Rollout.draw_ids
    top_ids: np.ndarray | None = None  # [R, K] int32, distinct, by falling q
    top_logp: np.ndarray | None = None  # [R, K] float32, log q
    hidden: np.ndarray | None = None  # [R, D] last hidden states, behind the final norm: float32, or bfloat16 as the bits of uint16
    entropy: np.ndarray | None = None  # [R] float32, nats
    best_ids: np.ndarray | None = None  # [R] int32, the most probable id


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What the learner trains on: one rollout with its teacher scores."""

    rollout: Rollout
    teacher: TeacherScores | None


# ------------------------------------------------------------------------------------------ target-aligned, learner
@dataclass(frozen=True, slots=True, kw_only=True)
class IdSet:
    """K ids per target with their cached log-probabilities."""

    ids: torch.Tensor  # [T, K] int64; 0 where `mask` of the micro-batch is False
    counts: torch.Tensor | None = None  # [T, K] float32, of draws: how often each was drawn, 0 for filling; None: every id stands once
    behaviour_logp: torch.Tensor | None  # [T, K] float32, log b
    teacher_logp: torch.Tensor | None  # [T, K] float32, log q
    teacher_log_rest: torch.Tensor | None = None  # [T] float32, log of the teacher's mass outside the ids


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences packed end to end. Target t is the token after input t: the only shift by one in the house."""

    token_ids: torch.Tensor  # [T] int64, inputs
    positions: torch.Tensor  # [T] int64, position inside its own sequence
    boundaries: torch.Tensor  # [N + 1] int32, first input of each sequence, then T
    sequences: torch.Tensor  # [T] int64, number of the sequence that the target belongs to
    mask: torch.Tensor  # [T] bool, True where the target is a response token
    token: IdSet  # K = 1: the target itself
    head: IdSet | None = None
    draws: IdSet | None = None
    top: IdSet | None = None
    teacher_hidden: torch.Tensor | None = None  # [T, D] in the teacher's dtype, [T, 0] if no response counts; 0 where mask is False
    teacher_entropy: torch.Tensor | None = None  # [T] float32
    teacher_best: torch.Tensor | None = None  # [T] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class IdScores:
    """An `IdSet` seen by the current student."""

    ids: torch.Tensor  # [T, K] int64
    counts: torch.Tensor | None = None  # [T, K] float
    student_logp: torch.Tensor  # [T, K] float, log p, differentiable
    behaviour_logp: torch.Tensor | None  # [T, K] float, log b
    teacher_logp: torch.Tensor | None  # [T, K] float, log q
    student_log_rest: torch.Tensor | None = None  # [T] float, log of the student's mass outside the ids, differentiable; -1000 for none
    teacher_log_rest: torch.Tensor | None = None  # [T] float, the same of the teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseScores:
    """Student and teacher compared over the whole vocabulary."""

    divergence: torch.Tensor  # [T] float, what `Needs.divergence` names, differentiable
    kl: torch.Tensor  # [T] float, KL(p || q), detached


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """All that an estimator sees. Tensor parallelism is gone; rows with mask False hold arbitrary finite numbers."""

    mask: torch.Tensor  # [T] bool
    sequences: torch.Tensor  # [T] int64, number of the sequence: for what is weighed by whole responses
    token: IdScores | None = None  # K = 1: the target itself; None if only a divergence over the vocabulary is asked for
    head: IdScores | None = None
    draws: IdScores | None = None
    top: IdScores | None = None
    dense: DenseScores | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One loss per token, and per-token diagnostics that the learner averages over the global token count."""

    loss: torch.Tensor  # [T] float, nats
    diagnostics: Mapping[str, torch.Tensor] = field(default_factory=dict)  # name -> [T], detached; "kl" where known


# ------------------------------------------------------------------------------------------------ reports, requests
@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step as the learner saw it."""

    version: int  # optimizer steps done, this one included
    loss: float  # nats per response token, over the global batch
    diagnostics: dict[str, float]  # per-token means over the global batch; quantiles of the ratio and its effective sample size
    kl_by_position: dict[int, float]  # first response position of a bin, the bins being 0, 1, 2-3, 4-7, ... -> mean "kl"
    grad_norm: float  # before clipping
    learning_rate: float
    sequences: int
    tokens: int  # response tokens: the denominator of the loss
    lags: dict[int, int]  # lag in optimizer steps -> response tokens
    seconds: dict[str, float]  # stage -> s, wall
    skipped: bool = False  # loss or gradient was not finite: the weights are those of the step before


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did, as `summary.json` tells it. The evaluation fills the last fields where one was asked for."""

    steps: int
    max_lag: int  # the bound
    observed_lag_max: int  # what happened
    lag_histogram: dict[int, int]  # lag in optimizer steps -> response tokens
    tokens: int  # response tokens trained on
    wall_seconds: float  # of the loop, without start-up, export and evaluation
    tokens_per_second: float  # tokens / wall_seconds
    tokens_per_second_by_stage: dict[str, float]  # role -> tokens / busy seconds of the role
    seconds_by_stage: dict[str, float]  # stage or stage.part -> s, wall, summed over steps
    busy_seconds: dict[str, float]  # role -> s with work at hand, summed over replicas
    overlap: float  # busy seconds of all roles / wall_seconds
    hf_export: str  # Hugging Face folder of the trained student
    set_aside: int = 0  # prompts that could not be trained on; see quarantine.jsonl
    accuracy_before: float | None = None  # mean verifier score, greedy, held-out prompts
    accuracy_after: float | None = None
    teacher_accuracy: float | None = None
    kl_before: float | None = None  # nats per token, KL(student || teacher) on the student's own held-out samples
    kl_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of every role: who speaks."""

    role: str  # "learner" | "rollout" | "teacher"
    replica: int
    pid: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Controller to rollout -> Rollout."""

    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Among ranks that learner and rollout share -> Rollouts: as many prompts as are sampled in one turn."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Controller to teacher, one rollout -> TeacherScores. Inside a teacher: as many as its ranks score together."""

    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Controller to learner -> StepReport. All trajectories of one optimizer step."""

    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a rendezvous store listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTransport:
    """Controller to learner -> Address: listen for `receivers` weight receivers, which join as ranks 1.. of the group."""

    receivers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinTransport:
    """Controller to rollout -> Done: join the weight group at ranks first_rank .. first_rank + tp - 1."""

    address: Address
    first_rank: int
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendWeights:
    """Controller to learner -> Done: stream the current weights to all receivers."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveWeights:
    """Controller to rollout -> Done: receive beside generation, then pause, swap, resume."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCheckpoint:
    """Controller to learner -> Done: begin to write all that training goes on from into an empty folder."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishCheckpoint:
    """Controller to learner -> Done, once what was begun is on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCheckpoint:
    """Controller to learner -> Done: go on from what `SaveCheckpoint` wrote, in whatever layout."""

    path: str
    version: int  # that it must hold


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A prompt that is not trained on because what came of it cannot be."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardState:
    """What the guard remembers of earlier steps."""

    lengths: tuple[float, ...] = ()  # mean response lengths of the last window, tokens
    masses: tuple[float, ...] = ()  # support masses of the last window
    first_length: float | None = None  # None: the first window is not over yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Learner to controller, in answer to FinishCheckpoint."""

    fault: str = ""  # why nothing was saved after all; the learner goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where the loop stood at one moment: with the learner's checkpoint of the same moment, all that a run goes on from."""

    version: int  # optimizer steps done
    prompts: int  # the cursor: prompts before this index are trained on or set aside, for ever
    metrics_bytes: int  # length of metrics.jsonl
    settings: str  # digest of the settings and prompts that must not change
    tokens: int  # this and the following as in `RunSummary`, so far
    wall_seconds: float
    lag_histogram: dict[int, int]
    seconds_by_stage: dict[str, float]
    busy_seconds: dict[str, float]
    guard: GuardState
    metrics: dict[str, float | None] = field(default_factory=dict)  # loss and diagnostics of step `version`; None: not a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Controller to learner -> Done: write the current weights as a Hugging Face folder."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Controller to any role -> Done, then the role ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The plain answer, with what was spent on it."""

    seconds: dict[str, float] = field(default_factory=dict)  # part -> s, wall


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a weight update under its Hugging Face name; a manifest is a tuple of these, in sending order."""

    name: str
    dtype: str  # "bfloat16" | "float32" | ...: an attribute of torch
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """The vocabulary rows [start, stop) that this rank's head shard holds, and who holds the rest."""

    start: int
    stop: int  # rows of the head at or past `vocab_size - start` are padding and count for nothing
    vocab_size: int  # true size over all ranks, without padding
    group: torch.distributed.ProcessGroup | None = None  # None: this rank holds the whole vocabulary
    sequence_parallel: bool = False  # hidden states arrive split over the group along T
