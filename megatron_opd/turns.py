"""Who holds the devices that learner and rollout share: one of them at a time. It knows neither Megatron-Core nor vLLM.

Both roles live in the same processes, one process a rank. The first rank has a desk for each, so the controller sees two
peers and does not know. A turn is one request of either, or all prompts that wait at its beginning; responses go out as
they end. Requests other than prompts come first: what the learner is asked for is what frees slots.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from megatron_opd.runtime import rpc
from megatron_opd.runtime.collective import Ranks
from megatron_opd.types import (
    Address,
    Done,
    Generate,
    HostTransport,
    JoinTransport,
    LoadCheckpoint,
    Prompt,
    ReceiveWeights,
    Rollout,
    Sample,
    SaveCheckpoint,
    SendWeights,
    Stop,
    TensorSpec,
    Train,
)

_GATHER_S = 0.02  # after a first prompt: those of a batch come within moments of each other
_Request = tuple[rpc.Desk, bytes, object]  # where it came from, its number, its message


class Student(Protocol):
    """The learner as its turn-taking twin sees it."""

    def manifest(self, dtype: str) -> Sequence[TensorSpec]:
        """What `weights` yields."""

    def weights(self, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors, on the first rank."""

    def park(self) -> None:
        """Leaves the device to the rollout."""

    def unpark(self) -> None:
        """Takes the device back."""


class Sampler(Protocol):
    """The rollout engine as its turn-taking twin sees it."""

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Rollout]:
        """Responses in the order in which they end."""

    def load(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Takes new weights over."""

    def sleep(self) -> None:
        """Leaves the device to the learner."""


class Handler(Protocol):
    """One answer to one request, in a list."""

    def __call__(self, message: object) -> list[object]:
        """The answer."""


class Turns:
    """Answers the requests of both roles; every rank runs it in lockstep."""

    def __init__(self, learner: Student, rollout: Sampler, answer: Handler, ranks: Ranks, *, dtype: str) -> None:
        """`answer` is the learner's own way with requests; weights change hands in `dtype`."""
        self._learner = learner
        self._rollout = rollout
        self._answer = answer
        self._ranks = ranks
        self._dtype = dtype
        self._handed_over: int | None = None

    def take(self, message: object) -> Iterator[object]:
        """One turn, answer by answer."""
        match message:
            case Sample(prompts=prompts):
                self._learner.park()
                yield from self._rollout.generate(prompts)
            case HostTransport():
                yield Address(host="", port=0)  # nobody connects: what is handed over stays in the process
            case JoinTransport():
                yield Done()
            case SendWeights(version=version) | ReceiveWeights(version=version):
                yield Done(seconds=self._hand_over(version))
            case Train() | SaveCheckpoint() | LoadCheckpoint():
                self._rollout.sleep()
                self._learner.unpark()
                yield from self._answer(message)
            case _:
                yield from self._answer(message)

    def _hand_over(self, version: int) -> dict[str, float]:
        """Once for each version, whichever end is asked first."""
        if self._handed_over == version:
            return {}
        self._handed_over = version
        return self._rollout.load(version, self._full_tensors())

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """On every rank, one after another; the first rank holds all of them meanwhile."""
        mine = dict(self._learner.weights(self._dtype))
        for spec in self._learner.manifest(self._dtype):
            yield spec.name, self._ranks.broadcast_tensor(mine.pop(spec.name, None), spec)


class Desks:
    """The first rank's desks, one for each role."""

    def __init__(self, desks: Sequence[rpc.Desk]) -> None:
        self._open = list(desks)
        self._queue: list[_Request] = []
        self._turn: list[_Request] = []
        for desk in desks:
            desk.greet()

    def next_turn(self) -> object:
        """What comes next: all prompts that wait as one `Sample`, or a request of another kind; one `Stop`, when all roles are stopped."""
        while not (turn := self._take()):
            self._read()
            if any(isinstance(message, Generate) for _, _, message in self._queue):
                time.sleep(_GATHER_S)
                self._read(wait=False)
        self._turn, message = turn, turn[0][2]
        return Sample(prompts=tuple(request.prompt for _, _, request in turn)) if isinstance(message, Generate) else message

    def answer(self, answer: object) -> None:
        """Sends an answer of this turn to where it was asked for."""
        asked = (request for request in self._turn if not isinstance(answer, Rollout) or request[2].prompt.index == answer.index)
        desk, number, _ = next(asked)
        desk.answer(number, answer)

    def fail(self, reason: str) -> None:
        """Tells all who wait for this turn."""
        for desk, number, _ in self._turn:
            desk.fail(number, reason)

    def close(self) -> None:
        """Flushes answers and closes."""
        for desk in self._open:
            desk.close()

    def _take(self) -> list[_Request]:
        for position, (_, _, message) in enumerate(self._queue):
            if not isinstance(message, Generate):
                return [self._queue.pop(position)]
        taken, self._queue = self._queue, []
        return taken

    def _read(self, *, wait: bool = True) -> None:
        for desk in rpc.ready(self._open, wait=wait):
            for number, message in desk.receive():
                if isinstance(message, Stop) and len(self._open) > 1:
                    desk.answer(number, Done())
                    desk.close()
                    self._open.remove(desk)
                else:
                    self._queue.append((desk, number, message))


def serve(desks: Desks | None, turns: Turns, ranks: Ranks) -> None:
    """Takes turns until both roles are stopped. Only the first rank has desks."""
    while True:
        message = ranks.share(desks.next_turn() if desks else None)
        try:
            for answer in turns.take(message):
                if desks:
                    desks.answer(answer)
        except Exception as error:
            if desks:
                desks.fail(f"{type(error).__name__}: {error}")
            raise
        if isinstance(message, Stop):
            ranks.close()
            if desks:
                desks.close()
            return
