"""When things happen. The controller moves prompts, trajectories and versions; it never sees a tensor's meaning.

Three kinds of tasks share the store: `_admit` starts a journey whenever a slot is free, each journey takes one prompt
through rollout and teacher, and `_train` consumes whole batches in order of start and publishes the new weights, which
frees slots. Nobody else waits for anybody.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_opd.config import Config
from megatron_opd.data.prompts import PromptSource
from megatron_opd.errors import GuardError
from megatron_opd.guard import Guard
from megatron_opd.metrics import StepLog
from megatron_opd.runtime.rpc import Peer, least_busy
from megatron_opd.store.fifo import TrajectoryStore
from megatron_opd.types import (
    Export,
    Generate,
    HostTransport,
    JoinTransport,
    Prompt,
    ReceiveWeights,
    Rollout,
    RunSummary,
    Score,
    Segment,
    SendWeights,
    StepReport,
    Stop,
    Train,
    Trajectory,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everyone the controller talks to."""

    learner: Peer
    rollouts: Sequence[Peer] = ()  # none: the prompts' own completions are trained on
    teachers: Sequence[Peer] = ()  # none: the estimator needs no teacher

    @property
    def everyone(self) -> tuple[Peer, ...]:
        """All peers, each once."""
        return (self.learner, *self.rollouts, *self.teachers)


@dataclass(slots=True)
class Totals:
    """What a run has seen so far."""

    tokens: int = 0  # response tokens trained on
    lags: Counter[int] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)  # stage -> s


class Controller:
    """One run of the loop."""

    def __init__(self, config: Config, prompts: PromptSource, roles: Roles, log: StepLog) -> None:
        self._config = config
        self._prompts = prompts
        self._roles = roles
        self._log = log
        self._timeout_s = config.run.peer_timeout_s
        self._guard = Guard(config.guard)
        self._store = TrajectoryStore(batch=config.loop.batch, max_lag=config.loop.max_lag)
        self.totals = Totals()

    async def run(self, export_path: str) -> RunSummary:
        """Trains for `loop.steps` optimizer steps, writes the student to `export_path`.

        Raises:
            ExceptionGroup: of PeerError and the like, the first failure of any role; of GuardError, if the run goes wrong.
        """
        await self._open_transport()
        started = time.monotonic()
        for peer in self._roles.everyone:
            peer.busy_s = 0.0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._admit(tasks))
            await self._train(export_path)
        summary = self._summary(time.monotonic() - started, export_path)
        await self._roles.learner.call(Export(path=export_path), self._timeout_s)
        return summary

    async def stop(self) -> None:
        """Ends all roles in order."""
        for peer in self._roles.everyone:
            await peer.call(Stop(), self._timeout_s)

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        for _ in range(self._config.loop.steps * self._config.loop.batch):
            index = await self._store.admit()
            tasks.create_task(self._journey(self._prompts.prompt(index)))

    async def _journey(self, prompt: Prompt) -> None:
        rollout = await self._generate(prompt)
        teacher = None
        if self._roles.teachers:
            teacher = await least_busy(self._roles.teachers).call(Score(rollouts=(rollout,)), self._timeout_s)
        await self._store.put(Trajectory(rollout=rollout, teacher=teacher))

    async def _generate(self, prompt: Prompt) -> Rollout:
        if self._roles.rollouts:
            return await least_busy(self._roles.rollouts).call(Generate(prompt=prompt), self._config.rollout.timeout_s)
        assert prompt.completion_ids is not None, "prompts were loaded with completions, since no rollout role was placed"
        start = Segment(first_token=0, version=prompt.index // self._config.loop.batch)
        return Rollout(
            index=prompt.index, prompt_ids=prompt.token_ids, response_ids=prompt.completion_ids, segments=(start,), finish_reason="stop"
        )

    async def _train(self, export_path: str) -> None:
        for version in range(1, self._config.loop.steps + 1):
            started = time.monotonic()
            batch = await self._store.take()
            waited = time.monotonic()
            report: StepReport = await self._roles.learner.call(Train(trajectories=batch), self._timeout_s)
            trained = time.monotonic()
            if self._config.loop.exact_lag:
                end = self._config.loop.batch * min(version + self._config.loop.max_lag, self._config.loop.steps)
                await self._store.finished(end)
            settled = time.monotonic()
            parts = await self._publish(version)
            await self._store.release(version)
            wait_s = waited - started + settled - trained
            self._account(report, {"wait": wait_s, "train": trained - waited, "publish": time.monotonic() - settled}, parts, batch)
            await self._export_and_guard(report, batch, export_path)

    async def _export_and_guard(self, report: StepReport, batch: Sequence[Trajectory], export_path: str) -> None:
        """Writes the student where it is due, and where the guard stops the run: what went wrong can be looked at."""
        every, path = self._config.loop.export_every, f"{export_path}-{report.version}"
        if every and report.version % every == 0:
            await self._roles.learner.call(Export(path=path), self._timeout_s)
        if not self._roles.rollouts:
            return
        try:
            self._guard.watch(report, sum(len(trajectory.rollout.response_ids) for trajectory in batch) / len(batch))
        except GuardError:
            await self._roles.learner.call(Export(path=path), self._timeout_s)
            raise

    async def _open_transport(self) -> None:
        """Joins learner and rollouts into one weight group and sends version 0: what is sampled is what is trained."""
        if not self._roles.rollouts:
            return
        width = self._config.rollout.tensor_parallel
        receivers = width * len(self._roles.rollouts)
        address = await self._roles.learner.call(HostTransport(receivers=receivers), self._timeout_s)
        joins = [
            JoinTransport(address=address, first_rank=1 + i * width, world_size=1 + receivers) for i in range(len(self._roles.rollouts))
        ]
        async with asyncio.TaskGroup() as tasks:
            for peer, join in zip(self._roles.rollouts, joins, strict=True):
                tasks.create_task(peer.call(join, self._timeout_s))
        await self._publish(0)

    async def _publish(self, version: int) -> dict[str, float]:
        """Streams the learner's weights into every rollout replica; returns the slowest replica's seconds by part."""
        if not self._roles.rollouts:
            return {}
        limit_s = 2 * self._timeout_s  # the two ends time out by themselves first, and know better whom they miss
        async with asyncio.TaskGroup() as tasks:
            send = tasks.create_task(self._roles.learner.call(SendWeights(version=version), limit_s))
            receive = [tasks.create_task(peer.call(ReceiveWeights(version=version), limit_s)) for peer in self._roles.rollouts]
        slowest = max((task.result() for task in receive), key=lambda done: sum(done.seconds.values()))
        return {f"send.{k}": v for k, v in send.result().seconds.items()} | {f"receive.{k}": v for k, v in slowest.seconds.items()}

    def _summary(self, wall_s: float, export_path: str) -> RunSummary:
        busy = Counter({"rollout": 0.0, "teacher": 0.0, "learner": 0.0})
        for peer in self._roles.everyone:
            busy[peer.hello.role] += peer.busy_s
        return RunSummary(
            steps=self._config.loop.steps,
            max_lag=self._config.loop.max_lag,
            observed_lag_max=max(self.totals.lags, default=0),
            lag_histogram=dict(sorted(self.totals.lags.items())),
            tokens=self.totals.tokens,
            wall_seconds=wall_s,
            tokens_per_second=self.totals.tokens / wall_s,
            tokens_per_second_by_stage={role: self.totals.tokens / busy_s for role, busy_s in busy.items() if busy_s > 0},
            seconds_by_stage=dict(self.totals.seconds),
            busy_seconds=dict(busy),
            overlap=sum(busy.values()) / wall_s,
            hf_export=export_path,
        )

    def _account(self, report: StepReport, seconds: dict[str, float], parts: dict[str, float], batch: Sequence[Trajectory]) -> None:
        self.totals.tokens += report.tokens
        self.totals.lags.update(report.lags)
        self.totals.seconds.update(seconds)
        self.totals.seconds.update({f"train.{k}": v for k, v in report.seconds.items()} | {f"publish.{k}": v for k, v in parts.items()})
        assert max(report.lags, default=0) <= self._config.loop.max_lag, f"lag {max(report.lags)} exceeds loop.max_lag: the store is broken"
        lengths = [len(trajectory.rollout.response_ids) for trajectory in batch]
        stopped = sum(trajectory.rollout.finish_reason == "stop" for trajectory in batch)
        self._log.write(report, seconds, mean_length=sum(lengths) / len(lengths), stopped=stopped / len(batch))
