"""The seams: where two real implementations exist."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from megatron_opd.types import Address, Estimate, JoinTransport, Needs, Prompt, Rollout, TeacherScores, TensorSpec, TokenScores


class Estimator(Protocol):
    """A distillation objective: a frozen dataclass whose fields are its settings."""

    @property
    def needs(self) -> Needs: ...

    def __call__(self, scores: TokenScores) -> Estimate: ...


class RolloutBackend(Protocol):
    """Draws responses and takes new weights between tokens."""

    async def generate(self, prompt: Prompt) -> Rollout: ...

    async def join_transport(self, request: JoinTransport) -> None: ...

    async def receive_weights(self, version: int) -> dict[str, float]:
        """Pauses, receives, swaps, resumes; returns seconds by part."""

    async def close(self) -> None: ...


class TeacherBackend(Protocol):
    """Scores finished rollouts; called with as many as fit its token budget."""

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]: ...

    def close(self) -> None: ...


class WeightSender(Protocol):
    """The learner's end of a weight transport."""

    def listen(self, receivers: int) -> Address: ...

    def send(self, version: int, manifest: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]: ...

    def close(self) -> None: ...


class WeightReceiver(Protocol):
    """A rollout worker's end of a weight transport."""

    def receive(self, version: int, manifest: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]: ...

    def close(self) -> None: ...
