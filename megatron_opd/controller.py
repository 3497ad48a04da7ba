"""When things happen. The controller moves prompts, trajectories and versions; it never sees a tensor's meaning.

Three kinds of tasks share the store: `_admit` starts a journey whenever a slot is free, each journey takes one prompt
through rollout and teacher, and `_train` consumes whole batches in order of start and publishes the new weights, which
frees slots. Nobody else waits for anybody. `_recruit` alone comes between a step and the next one: it gives the weights to
rollouts that took the place of lost ones.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from megatron_opd.config import Config
from megatron_opd.data.faults import Limits, fault_of
from megatron_opd.data.prompts import PromptSource
from megatron_opd.errors import CheckpointError, GuardError, LearnerLostError, PeerError, StalenessError, UnfitError
from megatron_opd.fleet import Fleet, Samplers, Seat
from megatron_opd.guard import Guard
from megatron_opd.metrics import StepLog
from megatron_opd.recovery import Recovery
from megatron_opd.runtime.rpc import Hub, Peer
from megatron_opd.store.fifo import TrajectoryStore
from megatron_opd.store.journal import file_of
from megatron_opd.store.pieces import joined
from megatron_opd.types import (
    Export,
    FinishCheckpoint,
    Generate,
    LoadCheckpoint,
    Prompt,
    Rollout,
    RunState,
    RunSummary,
    SaveCheckpoint,
    Saved,
    Score,
    Segment,
    StepReport,
    Stop,
    TeacherScores,
    Train,
    Trajectory,
)

_LOG = logging.getLogger(__name__)
_CHECKPOINT_ATTEMPTS = 5
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everyone the controller talks to."""

    hub: Hub
    learner: Seat
    rollouts: Samplers | None = None  # None: the prompts' own completions are trained on
    teachers: Fleet | None = None  # None: the estimator needs no teacher


@dataclass(slots=True)
class Totals:
    """What a run has seen so far, earlier processes of it included."""

    tokens: int = 0  # response tokens trained on
    lags: Counter[int] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)  # stage -> s


class Controller:
    """One run of the loop, from where `recovery` says that it stood."""

    def __init__(self, config: Config, prompts: PromptSource, roles: Roles, log: StepLog, recovery: Recovery, limits: Limits) -> None:
        self._config = config
        self._prompts = prompts
        self._roles = roles
        self._log = log
        self._recovery = recovery
        self._limits = limits
        self._timeout_s = config.run.peer_timeout_s
        before = recovery.before
        self._guard = Guard(config.guard, before.guard)
        self._store = TrajectoryStore(
            batch=config.loop.batch, max_lag=config.loop.max_lag, version=before.version, most_bytes=config.loop.store_bytes
        )
        self._version = before.version  # of the learner's weights
        self._asking = asyncio.Lock()  # held while the learner is asked, and while a new one is brought to the lost one's step
        self._weights = asyncio.Lock()  # held from a step to the end of its publication, and while a newcomer is given weights
        self._journeys: set[asyncio.Task] = set()
        self._unfinished: RunState | None = None  # of a checkpoint that is being written
        self._writer: Peer | None = None  # who writes it
        self._saved = before.version  # of the last checkpoint, unfinished or not
        self._failures = 0  # of checkpoints, in a row
        self._metrics = before.metrics  # of the last step
        self._started = time.monotonic()
        self.totals = Totals(tokens=before.tokens, lags=Counter(before.lag_histogram), seconds=Counter(before.seconds_by_stage))

    async def run(self, export_path: str, stop: asyncio.Event) -> RunSummary | None:
        """Trains up to step `loop.steps` and writes the student to `export_path`; None if `stop` made it end before.

        It ends behind the step that is under way, with a checkpoint.

        Raises:
            ExceptionGroup: of PeerError and the like, the first failure that is not survived; of GuardError, if the run goes wrong;
                of StalenessError, if a step saw older tokens than it may.
        """
        if self._recovery.learner_folder is not None:
            await self._ask_learner(LoadCheckpoint(path=str(self._recovery.learner_folder), version=self._version))
        await self._publish(self._version)
        self._started = time.monotonic()
        for peer in self._roles.hub.everyone():
            peer.busy_s = 0.0
        async with asyncio.TaskGroup() as tasks:
            others = [tasks.create_task(self._admit(tasks)), tasks.create_task(self._recruit())]
            await self._train(export_path, stop)
            while self._unfinished is not None:
                await self._finish_checkpoint()
            for task in [*others, *self._journeys]:
                task.cancel()
        if self._version < self._config.loop.steps:
            return None
        summary = self._summary(export_path)
        await self._export(export_path)
        return summary

    async def stop(self) -> None:
        """Ends all roles in order; a rollout or teacher that died before it was told has ended too.

        Raises:
            PeerError: the learner failed.
        """
        self._roles.hub.dismiss()
        for peer in self._roles.hub.everyone():
            try:
                await peer.call(Stop(), self._timeout_s)
            except PeerError as error:
                if peer is self._roles.learner.peer:
                    raise
                _LOG.warning("at the end of the run: %s", error)

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        for _ in range(self._recovery.before.prompts, self._config.loop.steps * self._config.loop.batch):
            index = await self._store.admit()
            journey = tasks.create_task(self._journey(self._prompts.prompt(index)))
            self._journeys.add(journey)
            journey.add_done_callback(self._journeys.discard)

    async def _journey(self, prompt: Prompt) -> None:
        trajectory = await self._trajectory(prompt)
        if trajectory is None:
            await self._store.skip(prompt.index)
        else:
            await self._store.put(trajectory)

    async def _trajectory(self, prompt: Prompt) -> Trajectory | None:
        """What rollout and teacher make of a prompt; None if it cannot be trained on. What was paid for before is not paid again."""
        paid = await self._recovery.paid(prompt.index // self._config.loop.batch + 1)
        if prompt.index in paid.set_aside:
            return None
        rollout = None
        try:
            rollout = paid.rollouts.pop(prompt.index, None) or await self._generate(prompt, paid.begun.pop(prompt.index, None))
            self._check(rollout, rollout)
            if self._roles.teachers is None:
                return Trajectory(rollout=rollout, teacher=None)
            scores = paid.scores.pop(prompt.index, None) or await self._score(self._roles.teachers, rollout)
            self._check(scores, rollout)
        except UnfitError as error:
            return await self._recovery.set_aside(prompt, rollout, str(error))
        return Trajectory(rollout=rollout, teacher=scores)

    async def _generate(self, prompt: Prompt, begun: Rollout | None = None) -> Rollout:
        if self._roles.rollouts is not None:
            return await self._sample(self._roles.rollouts, prompt, begun)
        assert prompt.completion_ids is not None, "prompts were loaded with completions, since no rollout role was placed"
        start = Segment(first_token=0, version=prompt.index // self._config.loop.batch)
        return Rollout(
            index=prompt.index, prompt_ids=prompt.token_ids, response_ids=prompt.completion_ids, segments=(start,), finish_reason="stop"
        )

    async def _sample(self, rollouts: Samplers, prompt: Prompt, response: Rollout | None) -> Rollout:
        """A whole response, piece by piece where `rollout.piece_tokens` says so, behind the one that an interrupted run has begun."""
        piece = response
        while response is None or (response.finish_reason == "unfinished" and not fault_of(piece, piece, self._limits)):
            begun_ids = response.response_ids if response is not None else None
            piece = await rollouts.ask(Generate(prompt=replace(prompt, begun_ids=begun_ids)), self._config.rollout.timeout_s)
            await self._recovery.keep(piece)
            response = joined(response, piece)
            assert response is not None, f"prompt {prompt.index}: a piece at {piece.segments} was not asked for"
        return response

    async def _score(self, teachers: Fleet, rollout: Rollout) -> TeacherScores:
        scores = await teachers.ask(Score(rollouts=(rollout,)), self._timeout_s)
        await self._recovery.keep(scores)
        return scores

    def _check(self, made: Rollout | TeacherScores, rollout: Rollout) -> None:
        """Raises UnfitError for what must not be trained on. Completions that came with the prompts were checked with them."""
        given = made is rollout and self._roles.rollouts is None
        if not given and (fault := fault_of(made, rollout, self._limits)):
            raise UnfitError(fault)

    async def _train(self, export_path: str, asked: asyncio.Event) -> None:
        for version in range(self._version + 1, self._config.loop.steps + 1):
            started = time.monotonic()
            batch = await self._next_batch(version, asked)
            if batch is None:
                return await self._begin_checkpoint()
            waited = time.monotonic()
            async with self._weights:
                report: StepReport = await self._ask_learner(Train(trajectories=batch))
                self._version, self._metrics = version, self._recovery.metrics(report)
                trained = time.monotonic()
                if self._config.loop.exact_lag:
                    end = self._config.loop.batch * min(version + self._config.loop.max_lag, self._config.loop.steps)
                    await self._store.finished(end)
                settled = time.monotonic()
                parts = await self._publish(version)
            await self._store.release(version)
            wait_s = waited - started + settled - trained
            seconds = {"wait": wait_s, "train": trained - waited, "publish": time.monotonic() - settled}
            await self._account(report, seconds, parts, batch)
            await self._finish_checkpoint()
            await self._export_and_guard(report, batch, export_path)
            if self._recovery.due(version):
                await self._begin_checkpoint()

    async def _next_batch(self, version: int, asked: asyncio.Event) -> tuple[Trajectory, ...] | None:
        """The batch that makes `version`, settled in the journal; None if the run is asked to stop before it is complete."""
        take, stop = asyncio.create_task(self._store.take()), asyncio.create_task(asked.wait())
        try:
            await asyncio.wait({take, stop}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                return None
            batch = take.result()
        finally:
            take.cancel()
            stop.cancel()
        if not batch:
            raise GuardError(
                f"all prompts of step {version} were set aside; see quarantine.jsonl in {self._config.run.dir}, mend what it says, remove "
                f"journal/{file_of(version)} there, and go on with --resume"
            )
        await self._recovery.settle(version)
        return batch

    async def _begin_checkpoint(self) -> None:
        """Lets the learner write while the next step goes on; `_finish_checkpoint` makes it one unit with where the loop stands now."""
        if self._version in (self._saved, 0):
            return
        self._writer = await self._insist(self._save)
        self._log.sync()
        self._unfinished, self._saved = self._state(), self._version

    async def _save(self) -> Peer:
        """Who writes."""
        folder, writer = await self._recovery.begin(self._version), self._roles.learner.peer
        await self._roles.learner.call(SaveCheckpoint(path=str(folder)), self._timeout_s)
        return writer

    async def _fault_of_checkpoint(self) -> str:
        """Why what was begun is not on disk; empty if it is."""
        assert self._writer is not None, "nothing was begun"
        if self._writer is not self._roles.learner.peer:
            return f"{self._writer.name} was lost"
        try:
            saved: Saved = await self._roles.learner.call(FinishCheckpoint(), self._timeout_s)
        except LearnerLostError as error:
            await self._replace_learner()
            return str(error)
        return saved.fault

    async def _finish_checkpoint(self) -> None:
        """Waits until what the learner writes is on disk; if it could not be written, one of the present step is begun instead."""
        if self._unfinished is None:
            return
        state, self._unfinished = self._unfinished, None
        fault = await self._fault_of_checkpoint()
        if not fault:
            self._failures = 0
            async with self._asking:  # nobody else may be going back to what this removes
                return await self._recovery.commit(state)
        self._failures += 1
        if self._failures == _CHECKPOINT_ATTEMPTS:
            raise CheckpointError(f"{_CHECKPOINT_ATTEMPTS} checkpoints in a row: {fault}")
        _LOG.warning("the run has no checkpoint of step %d: %s", state.version, fault)
        self._saved = 0
        await self._begin_checkpoint()

    async def _export_and_guard(self, report: StepReport, batch: Sequence[Trajectory], export_path: str) -> None:
        """Writes the student where it is due, and where the guard stops the run: what went wrong can be looked at."""
        every, path = self._config.loop.export_every, f"{export_path}-{report.version}"
        if every and report.version % every == 0:
            await self._export(path)
        sampled = self._roles.rollouts is not None
        try:
            self._guard.watch(report, sum(len(trajectory.rollout.response_ids) for trajectory in batch) / len(batch) if sampled else None)
        except GuardError:
            await self._export(f"{path}-stopped")
            raise

    async def _export(self, path: str) -> None:
        await self._recovery.room_for_export()
        await self._ask_learner(Export(path=path))

    async def _publish(self, version: int) -> dict[str, float]:
        """Streams the learner's weights into every rollout replica: what is sampled is what is trained, version 0 included."""
        rollouts = self._roles.rollouts
        return await self._insist(lambda: rollouts.publish(version)) if rollouts is not None else {}

    async def _ask_learner(self, message: object) -> Any:
        return await self._insist(lambda: self._roles.learner.call(message, self._timeout_s))

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the learner makes of a request; if it is lost, its successor is asked, once it stands where the lost one stood."""
        while True:
            try:
                async with self._asking:
                    return await ask()
            except LearnerLostError as error:
                _LOG.warning("the learner is lost, and waited for: %s", error)
                await self._replace_learner()

    async def _replace_learner(self) -> None:
        """Brings a new learner to the present step: the last checkpoint, and the steps behind it once more on what the journal says.

        Nothing else goes back. Rollouts keep their weights, so what they sample meanwhile is as old as its version says.
        """
        learner = self._roles.learner
        async with self._asking:
            while learner.peer.lost:
                await learner.successor()
                try:
                    await self._catch_up()
                except LearnerLostError as error:
                    _LOG.warning("its successor is lost too: %s", error)

    async def _catch_up(self) -> None:
        folder, saved = self._recovery.newest()
        if folder is not None:
            await self._roles.learner.call(LoadCheckpoint(path=str(folder), version=saved), self._timeout_s)
        for version in range(saved + 1, self._version + 1):
            _LOG.info("step %d of %d is made again", version, self._version)
            await self._roles.learner.call(Train(trajectories=await self._past(version)), self._timeout_s)

    async def _past(self, version: int) -> tuple[Trajectory, ...]:
        """What a step was trained on.

        Raises:
            CheckpointError: the journal lacks some of it.
        """
        paid, found = await self._recovery.past(version), []
        for index in range((version - 1) * self._config.loop.batch, version * self._config.loop.batch):
            if index in paid.set_aside:
                continue
            rollout, scores = paid.rollouts.get(index), paid.scores.get(index)
            if self._roles.rollouts is None:
                rollout = await self._generate(self._prompts.prompt(index))
            if rollout is None or (scores is None and self._roles.teachers is not None):
                raise CheckpointError(f"the journal of step {version} lacks prompt {index}: the new learner cannot make that step again")
            found.append(Trajectory(rollout=rollout, teacher=scores))
        return tuple(found)

    async def _recruit(self) -> None:
        """Gives the current weights to rollouts that took the place of lost ones, for ever."""
        while self._roles.rollouts is not None:
            await self._roles.rollouts.newcomer()
            async with self._weights:
                if self._roles.rollouts.has_newcomers():  # the step that held the lock may have published to them
                    await self._publish(self._version)

    def _state(self) -> RunState:
        return RunState(
            version=self._version,
            prompts=self._version * self._config.loop.batch,
            metrics_bytes=self._log.size,
            settings=self._recovery.digest,
            tokens=self.totals.tokens,
            wall_seconds=self._recovery.before.wall_seconds + time.monotonic() - self._started,
            lag_histogram=dict(sorted(self.totals.lags.items())),
            seconds_by_stage=dict(self.totals.seconds),
            busy_seconds=self._busy_seconds(),
            guard=self._guard.state,
            metrics=self._metrics,
        )

    def _busy_seconds(self) -> dict[str, float]:
        busy = Counter({"rollout": 0.0, "teacher": 0.0, "learner": 0.0})
        busy.update(self._recovery.before.busy_seconds)
        for peer in self._roles.hub.ever():
            busy[peer.hello.role] += peer.busy_s
        return dict(busy)

    def _summary(self, export_path: str) -> RunSummary:
        state = self._state()
        busy, wall_s = state.busy_seconds, state.wall_seconds
        return RunSummary(
            steps=self._config.loop.steps,
            max_lag=self._config.loop.max_lag,
            observed_lag_max=max(state.lag_histogram, default=0),
            lag_histogram=state.lag_histogram,
            tokens=state.tokens,
            wall_seconds=wall_s,
            tokens_per_second=state.tokens / wall_s,
            tokens_per_second_by_stage={role: state.tokens / busy_s for role, busy_s in busy.items() if busy_s > 0},
            seconds_by_stage=state.seconds_by_stage,
            busy_seconds=busy,
            overlap=sum(busy.values()) / wall_s,
            hf_export=export_path,
            set_aside=self._recovery.set_aside_prompts,
        )

    async def _account(self, report: StepReport, seconds: dict[str, float], parts: dict[str, float], batch: Sequence[Trajectory]) -> None:
        self.totals.tokens += report.tokens
        self.totals.lags.update(report.lags)
        self.totals.seconds.update(seconds)
        self.totals.seconds.update({f"train.{k}": v for k, v in report.seconds.items()} | {f"publish.{k}": v for k, v in parts.items()})
        lag, bound = max(report.lags, default=0), self._config.loop.max_lag
        if lag > bound:
            raise StalenessError(
                f"step {report.version} trained on {report.lags[lag]} tokens sampled {lag} steps before, more than loop.max_lag={bound}; "
                "this is a fault of the loop: report it, and go on with --resume from the last checkpoint"
            )
        lengths = [len(trajectory.rollout.response_ids) for trajectory in batch]
        stopped = sum(trajectory.rollout.finish_reason == "stop" for trajectory in batch) / len(batch)
        indices = [trajectory.rollout.index for trajectory in batch]
        assert indices == sorted(set(indices)), f"step {report.version} trained on prompts {indices}"
        mean = sum(lengths) / len(lengths)
        await self._recovery.when_there_is_room(
            lambda: self._log.write(report, seconds, prompts=range(min(indices), max(indices) + 1), mean_length=mean, stopped=stopped)
        )
