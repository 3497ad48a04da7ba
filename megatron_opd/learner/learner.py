"""One optimizer step on trajectories, and the weights that come of it. Every rank of the learner runs this in lockstep.

It alone reduces: an estimator's loss per token is summed over micro-batches and data-parallel ranks and divided by the
one global count of response tokens. Logits never exist: hidden states leave the last pipeline stage for the kernel door.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import PretrainedConfig

from megatron_opd.config import LearnerConfig
from megatron_opd.data.packing import pack, plan, to_device
from megatron_opd.errors import DataError
from megatron_opd.interfaces import Estimator
from megatron_opd.kernels import TORCH, FP8Products, choose, fp8_noise, fp8_products
from megatron_opd.learner import diagnostics, optimizer
from megatron_opd.learner.checkpoint import TrainingState
from megatron_opd.learner.scores import Heads, Settings, score
from megatron_opd.model import parallel
from megatron_opd.model.build import build, head_weight
from megatron_opd.model.convert import export_hf, load_head, load_hf, stage_manifest
from megatron_opd.model.forward import forward_hidden
from megatron_opd.runtime.collective import Ranks
from megatron_opd.types import MicroBatch, StepReport, TensorSpec, Trajectory, VocabShard
from megatron_opd.weights.mapping import hf_manifest

LOG = logging.getLogger(__name__)

FP8_TOKENS = 128  # tokens of a rank that every recipe's products take a multiple of


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentModel:
    """Which model to train, and for how long."""

    path: str  # Hugging Face folder
    hf_config: PretrainedConfig
    steps: int  # optimizer steps of the whole run
    seed: int
    device: str  # "cpu" | "cuda"
    teacher: "TeacherHead | None" = None  # read only if the estimator compares whole distributions
    teacher_moments: bool = False  # trajectories carry entropy and arg-max of the teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """Where the teacher's LM head is, which turns its hidden states into q."""

    path: str  # Hugging Face folder
    hf_config: PretrainedConfig
    dtype: str


class Learner:
    """The student under training: model, optimizer, schedule."""

    def __init__(self, student: StudentModel, settings: LearnerConfig, estimator: Estimator, ranks: Ranks) -> None:
        self._settings = settings
        self._estimator = estimator
        self._ranks = ranks
        self._device = student.device
        self._hf_config = student.hf_config
        self._dtype = getattr(torch, settings.dtype)
        self._parallel = parallel.ParallelConfig(
            tensor=settings.tensor_parallel,
            pipeline=settings.pipeline_parallel,
            layers=settings.pipeline_layers,
            data=settings.data_parallel,
            expert=settings.expert_parallel,
            sequence_parallel=settings.sequence_parallel,
        )
        parallel.initialize(self._parallel, device=student.device, seed=student.seed)
        self._module = build(
            student.hf_config,
            self._parallel,
            dtype=self._dtype,
            recompute=settings.recompute,
            device=student.device,
            fp8_recipe=settings.fp8.recipe if settings.fp8.body else None,
        )
        load_hf(self._module, student.path, student.hf_config, self._parallel)
        self._module.config.finalize_model_grads_func = finalize_model_grads
        self._model = optimizer.wrap(self._module)
        self._optimizer, self._schedule = optimizer.build(settings.optimizer, self._model, dtype=self._dtype, steps=student.steps)
        self._module.config.grad_scale_func = self._optimizer.scale_loss
        self._state = TrainingState(self._module, self._optimizer, self._parallel)
        self._forward_backward = get_forward_backward_func()
        self._needs = replace(estimator.needs, moments=student.teacher_moments)
        shard = parallel.vocab_shard(student.hf_config.vocab_size, self._parallel)
        teacher = self._teacher_head(student, shard) if estimator.needs.divergence and self._module.post_process else None
        self._heads = Heads(student=head_weight(self._module), teacher=teacher, shard=shard) if self._module.post_process else None
        self._kernels = _kernels(settings, student.device)
        self._noise_due = False
        self.version = 0
        self._parked = False

    def train(self, trajectories: Sequence[Trajectory]) -> StepReport:
        """One optimizer step. Every rank gets the same trajectories, in the same order.

        A loss or gradient that is not finite leaves weights, moments and schedule as they are; the step still counts, as its data is spent.
        """
        started = time.monotonic()
        micro_batches = self._pack(trajectories)
        packed = time.monotonic()
        sums = self._gradients(micro_batches)
        computed = time.monotonic()
        tokens = sum(len(t.rollout.response_ids) for t in trajectories)
        means, kl_by_position = diagnostics.report(self._over_all_ranks(sums), tokens)
        self._warn_of_noise(means)
        stepped, grad_norm = self._step() if math.isfinite(means["loss"]) else (False, math.nan)
        lags = diagnostics.lags(trajectories, self.version)
        self.version += 1
        return StepReport(
            version=self.version,
            loss=means.pop("loss"),
            diagnostics=means,
            kl_by_position=kl_by_position,
            grad_norm=grad_norm,
            learning_rate=self._optimizer.param_groups[0]["lr"],
            sequences=len(trajectories),
            tokens=tokens,
            lags=lags,
            seconds={"pack": packed - started, "forward_backward": computed - packed, "optimizer": time.monotonic() - computed},
            skipped=not stepped,
        )

    def save(self, folder: str) -> None:
        """Begins to write all that training goes on from into an empty folder; `finish_save` waits for the end of it."""
        self._state.save(Path(folder), {"version": self.version, "schedule": self._schedule.num_steps})

    def finish_save(self) -> None:
        """Returns when what was begun is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        self._state.finish()

    def load(self, folder: str) -> None:
        """Goes on from a checkpoint of any layout; learning rates are those of the present settings.

        Raises:
            CheckpointError: it is damaged or of another model.
        """
        counters = self._state.load(Path(folder))
        self.version = counters["version"]
        self._schedule.step(increment=counters["schedule"] - self._schedule.num_steps)

    def manifest(self, dtype: str) -> tuple[TensorSpec, ...]:
        """Names and shapes of the student's tensors in a Hugging Face folder."""
        return hf_manifest(self._hf_config, dtype)

    def weights(self, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors in the order of the manifest, on the first rank; the others take part and yield nothing."""
        return export_hf(self._module, self._hf_config, self._parallel, dtype)

    @property
    def stage(self) -> int | None:
        """The pipeline stage whose tensors `stage_weights` yields on this rank; None: it takes part and yields nothing."""
        here = parallel.place()
        return here.pipeline if here.tensor == here.data == 0 else None

    def stage_manifest(self, dtype: str) -> tuple[TensorSpec, ...]:
        """Names and shapes of what `stage_weights` yields on this rank."""
        return stage_manifest(self._hf_config, self._parallel, dtype, self.stage) if self.stage is not None else ()

    def stage_weights(self, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors of each pipeline stage on the first rank of it, all stages at once; the other ranks take part."""
        return export_hf(self._module, self._hf_config, self._parallel, dtype, by_stage=True)

    def park(self) -> None:
        """Leaves the device's memory to others: gradients are dropped, optimizer state goes to the host. Nothing on CPU."""
        if self._device == "cuda" and not self._parked:
            self._model.offload_grad_buffers()
            self._optimizer.offload_to_cpu()
            self._parked = True

    def unpark(self) -> None:
        """Brings back what `park` put away."""
        if self._parked:
            self._model.restore_grad_buffers()
            self._optimizer.restore_from_cpu()
            self._parked = False

    def _step(self) -> tuple[bool, float]:
        """(whether weights changed, gradient norm). The learning rate of a step is set before it, and taken back where there was none."""
        self._schedule.step(increment=1)
        stepped, norm = optimizer.step(self._optimizer)
        if not stepped:
            self._schedule.step(increment=-1)
        return stepped, norm

    def _pack(self, trajectories: Sequence[Trajectory]) -> list[MicroBatch]:
        lengths = [len(t.rollout.prompt_ids) + len(t.rollout.response_ids) - 1 for t in trajectories]
        shares = plan(lengths, ranks=self._settings.data_parallel, micro_batch_tokens=self._settings.micro_batch_tokens)
        multiple = self._settings.tensor_parallel if self._settings.sequence_parallel else 1
        multiple *= FP8_TOKENS if self._settings.fp8.body else 1
        mine = shares[parallel.place().data]
        batches = [pack([trajectories[i] for i in indices], self._needs, pad_multiple=multiple) for indices in mine]
        for batch in batches:
            self._check_ids(batch)
        return [to_device(batch, self._device) for batch in batches]

    def _check_ids(self, batch: MicroBatch) -> None:
        """An id that no shard of the head holds would be scored as logit 0."""
        for ids in (batch.token_ids, *(one.ids for one in (batch.token, batch.head, batch.draws, batch.top) if one is not None)):
            if ids.max() >= self._hf_config.vocab_size or ids.min() < 0:
                raise DataError(
                    f"ids from {int(ids.min())} to {int(ids.max())} in a batch for a vocabulary of {self._hf_config.vocab_size}"
                )

    def _gradients(self, micro_batches: list[MicroBatch]) -> diagnostics.Sums:
        """Forward and backward over all micro-batches; gradients end up summed over ranks and divided by the token count."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        every, products = self._settings.fp8.noise_every, self._kernels.products
        self._noise_due = isinstance(products, FP8Products) and products.policy != "bf16" and every > 0 and self.version % every == 0
        stats = self._forward_backward(
            forward_step_func=self._forward,
            data_iterator=iter(micro_batches),
            model=[self._model],
            num_microbatches=len(micro_batches),
            seq_length=self._settings.micro_batch_tokens,
            micro_batch_size=1,
            forward_only=False,
        )
        sums: diagnostics.Sums = {}
        for one in stats:
            diagnostics.add(sums, {name: value.tolist() for name, value in one.items()})
        return sums

    def _forward(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        batch = next(batches)
        return forward_hidden(model, batch), partial(self._loss, batch=batch)

    def _loss(self, hidden: torch.Tensor, *, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(sum over tokens, token count, sums to report): Megatron's protocol for a loss with a global denominator."""
        assert self._heads is not None, "Megatron calls the loss on the last pipeline stage only"
        scores, seen = score(hidden.squeeze(1), self._heads, batch, self._needs, self._kernels)
        estimate = self._estimator(scores)
        loss = torch.where(batch.mask, estimate.loss, 0.0).sum()
        return loss, batch.mask.sum().int(), diagnostics.sums(batch, scores, estimate, seen) | self._noise(hidden.squeeze(1), batch)

    def _noise(self, hidden: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """What FP8 logits add to the KL, on the first micro-batch of a step where that is due."""
        if not self._noise_due:
            return {}
        self._noise_due = False
        heads, kernels = self._heads, self._kernels
        noise_T = fp8_noise(hidden, heads.student, heads.shard, kernels.products, rows=batch.mask, chunk_tokens=kernels.chunk_tokens)
        return {diagnostics.NOISE: torch.stack([noise_T.sum(), batch.mask.sum().to(noise_T)])}

    def _warn_of_noise(self, means: dict[str, float]) -> None:
        noise, kl = means.get(diagnostics.NOISE), means.get("kl", math.inf)
        if noise is not None and noise > kl:
            LOG.warning(
                "step %d: FP8 logits add %.2g nats to a KL of %.2g; set learner.fp8.logits=fp8x2 or bf16", self.version + 1, noise, kl
            )

    def _over_all_ranks(self, sums: diagnostics.Sums) -> diagnostics.Sums:
        """Sums over data-parallel ranks of the last stage, on every rank."""
        speaks = self._module.post_process and parallel.place().tensor == 0
        total: diagnostics.Sums = {}
        for part in self._ranks.gather(msgspec.msgpack.encode(sums if speaks else {})):
            diagnostics.add(total, msgspec.msgpack.decode(part, type=diagnostics.Sums))
        return total

    def _teacher_head(self, student: StudentModel, shard: VocabShard) -> torch.Tensor:
        assert student.teacher is not None, "the estimator compares whole distributions, so the learner needs the teacher's LM head"
        return load_head(student.teacher.path, student.teacher.hf_config, shard, student.teacher.dtype).to(self._device)


def _kernels(settings: LearnerConfig, device: str) -> Settings:
    """How the kernel doors are called, and a line in the log that says so."""
    implementation = choose(settings.kernels, device)
    products, how = TORCH, ""
    if implementation == "te":
        products = fp8_products(settings.fp8.logits, settings.fp8.recipe, device)
        maker = "emulated" if device == "cpu" else "TransformerEngine"
        how = f": logits {settings.fp8.logits}, recipe {settings.fp8.recipe}, {maker}"
    LOG.info("kernels: %s for learner.kernels=%s on %s%s", implementation, settings.kernels, device, how)
    return Settings(
        chunk_tokens=settings.logps_chunk_tokens,
        moments=settings.moments,
        schedule=settings.schedule,
        implementation=implementation,
        products=products,
    )
