"""The seams: where two real implementations exist."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from megatron_opd.types import Address, Estimate, JoinTransport, Needs, Prompt, Rollout, TeacherScores, TensorSpec, TokenScores


class Estimator(Protocol):
    """A distillation objective: a frozen dataclass whose fields are its settings."""

    @property
    def needs(self) -> Needs:
        """What rollouts and teachers must deliver for it."""

    def __call__(self, scores: TokenScores) -> Estimate:
        """One loss per token [T], in nats."""


class RolloutBackend(Protocol):
    """Draws responses and takes new weights between tokens."""

    async def generate(self, prompt: Prompt) -> Rollout:
        """One response; many may be asked for at once."""

    async def join_transport(self, request: JoinTransport) -> None:
        """Joins the learner's weight group."""

    async def receive_weights(self, version: int) -> dict[str, float]:
        """Pauses, receives, swaps, resumes; returns seconds by part."""

    async def close(self) -> None:
        """Gives up what runs and ends the engine."""


class TeacherBackend(Protocol):
    """Scores finished rollouts; called with as many as fit its token budget."""

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Scores in the order of `rollouts`, aligned with each response."""

    def close(self) -> None:
        """Frees the model."""


class WeightSender(Protocol):
    """The learner's end of a weight transport."""

    def listen(self, receivers: int) -> Address:
        """Where `receivers` receivers may join."""

    def send(self, version: int, manifest: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Streams one version to all receivers; returns seconds by part once all have verified it."""

    def close(self) -> None:
        """Leaves; whoever still waits fails at once."""


class WeightReceiver(Protocol):
    """A rollout worker's end of a weight transport."""

    def receive(self, version: int, manifest: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one version, each verified before it is yielded."""

    def close(self) -> None:
        """Leaves; a sender that still sends fails at once."""
