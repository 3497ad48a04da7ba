"""The loop in virtual time: the real controller and the real store, with roles that only take the seconds that they would.

A clock that jumps to the next event replaces the event loop's, so an hour of a cluster passes in a second. Roles on the
same cores, or taking turns on the same GPUs, share them evenly. It knows durations; it refuses to know where they come from.
"""

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from megatron_opd.config import Config, GuardConfig
from megatron_opd.controller import Controller, Roles
from megatron_opd.data.faults import Limits
from megatron_opd.fleet import Fleet, Samplers
from megatron_opd.placement import Process
from megatron_opd.plan.costs import Costs
from megatron_opd.plan.lengths import Lengths
from megatron_opd.recovery import beginning
from megatron_opd.store.journal import Paid
from megatron_opd.types import (
    Address,
    Done,
    Generate,
    Hello,
    HostTransport,
    Prompt,
    ReceiveWeights,
    Rollout,
    Score,
    Segment,
    SendWeights,
    StepReport,
    TeacherScores,
    Train,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The steady state of a simulated run."""

    step_s: float  # mean
    tokens_s: float  # response tokens
    lag: float  # mean, in optimizer steps
    busy: dict[str, float]  # role -> share of the time that a replica works
    outstanding: dict[str, float]  # role -> share of the time that a replica has something to answer, as runs account for it


class _Clock(selectors.DefaultSelector):
    """Nothing happens while everybody waits, so the clock jumps to whoever is due first."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everybody waits for somebody else: the loop is dead"
            self.now += max(timeout, 0.0)
        return events


class _Site:
    """What a role computes on; the jobs of all roles on it share it evenly."""

    def __init__(self) -> None:
        self._jobs = 0
        self._change = asyncio.Event()

    async def work(self, seconds: float, until: asyncio.Event | None = None) -> float:
        """Returns the seconds of work that were done when all are, or `until` is set."""
        loop, left = asyncio.get_running_loop(), seconds
        self._enter(1)
        try:
            while left > 1e-9 and not (until is not None and until.is_set()):
                share, start = 1 / self._jobs, loop.time()
                await _first(left / share, self._change, until)
                left -= (loop.time() - start) * share
        finally:
            self._enter(-1)
        return seconds - max(left, 0.0)

    def _enter(self, jobs: int) -> None:
        self._jobs += jobs
        self._change.set()
        self._change = asyncio.Event()


async def _first(seconds: float, *events: asyncio.Event | None) -> None:
    """Returns after `seconds`, or as soon as an event is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events if event is not None]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


class _Role:
    """A peer as the controller knows it, without a wire."""

    def __init__(self, role: str, replica: int, costs: Costs, site: _Site) -> None:
        self.hello = Hello(role=role, replica=replica, pid=0, host="")
        self.lost = ""  # none is, here
        self.outstanding = 0
        self.busy_s = 0.0
        self.worked_s = 0.0
        self._busy_since = 0.0
        self._costs = costs
        self._site = site

    async def call(self, message: object, timeout_s: float) -> Any:
        """The answer, when it would be there."""
        clock = asyncio.get_running_loop().time
        if self.outstanding == 0:
            self._busy_since = clock()
        self.outstanding += 1
        try:
            return await self._answer(message)
        finally:
            self.outstanding -= 1
            if self.outstanding == 0:
                self.busy_s += clock() - self._busy_since

    async def _answer(self, message: object) -> Any:
        return Done()

    async def _work(self, seconds: float, until: asyncio.Event | None = None) -> float:
        done = await self._site.work(seconds, until)
        self.worked_s += done
        return done


class _Learner(_Role):
    version = 0

    @property
    def peer(self) -> "_Learner":
        """Nobody takes its place."""
        return self

    async def _answer(self, message: object) -> Any:
        match message:
            case HostTransport():
                return Address(host="", port=0)
            case SendWeights():
                await asyncio.sleep(self._costs.publish_s)
            case Train(trajectories=batch):
                lags: dict[int, int] = {}
                for one in batch:
                    lag = self.version - one.rollout.segments[0].version
                    lags[lag] = lags.get(lag, 0) + len(one.rollout.response_ids)
                total = sum(len(one.rollout.prompt_ids) for one in batch) + sum(lags.values())
                await self._work(self._costs.learner_step_s + total * self._costs.learner_token_s)
                self.version += 1
                return StepReport(
                    version=self.version, loss=0.0, diagnostics={}, kl_by_position={}, grad_norm=0.0, learning_rate=0.0,
                    sequences=len(batch), tokens=sum(lags.values()), lags=lags, seconds={},
                )  # fmt: skip
        return Done()


class _Teacher(_Role):
    def __init__(self, replica: int, costs: Costs, site: _Site, batch_tokens: int, gather_s: float) -> None:
        super().__init__("teacher", replica, costs, site)
        self._batch_tokens, self._gather_s = batch_tokens, gather_s
        self._waiting: list[tuple[int, asyncio.Future]] = []
        self._arrived = asyncio.Event()

    async def turn(self) -> None:
        """Scores what has arrived, in order and as many at a time as fit."""
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self._gather_s)
            waiting, self._waiting = self._waiting, []
            self._arrived.clear()
            while waiting:
                ends = itertools.accumulate(tokens for tokens, _ in waiting)
                count = max(1, sum(end <= self._batch_tokens for end in ends))
                group, waiting = waiting[:count], waiting[count:]
                await self._work(sum(tokens for tokens, _ in group) * self._costs.teacher_token_s)
                for _, future in group:
                    future.set_result(None)

    async def _answer(self, message: object) -> Any:
        if not isinstance(message, Score):
            return Done()
        (rollout,) = message.rollouts
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((len(rollout.prompt_ids) + len(rollout.response_ids), future))
        self._arrived.set()
        await future
        return TeacherScores(index=rollout.index)


class _Engine(_Role):
    """Sequences that decode together gain a token each per step; the step takes longer the more they are."""

    def __init__(self, replica: int, costs: Costs, site: _Site, lengths: Callable[[int], int], keep_kv: bool) -> None:
        super().__init__("rollout", replica, costs, site)
        self._length_of, self._keep_kv = lengths, keep_kv
        self._seats = asyncio.Semaphore(costs.running)
        self._running: list[tuple[float, int, asyncio.Future]] = []  # (served when it is done, order, whom to tell)
        self._order = itertools.count()
        self._served = 0.0  # tokens that a sequence would have which ran from the start
        self._owed_s = 0.0  # of prefill
        self._prompt = 0
        self._version = 0
        self._paused = False
        self._changed = asyncio.Event()

    async def turn(self) -> None:
        """Decodes until the next sequence ends or something changes."""
        while True:
            self._changed.clear()
            if self._paused or not self._running:
                await self._changed.wait()
                continue
            step_s = self._costs.decode_s + len(self._running) * self._costs.decode_sequence_s
            left = self._running[0][0] - self._served
            done = await self._work(self._owed_s + left * step_s, self._changed)
            prefilled = min(done, self._owed_s)
            self._owed_s -= prefilled
            self._served += (done - prefilled) / step_s
            while self._running and self._running[0][0] <= self._served + 1e-6:
                heapq.heappop(self._running)[2].set_result(None)

    async def _answer(self, message: object) -> Any:
        match message:
            case Generate(prompt=prompt):
                return await self._generate(prompt)
            case ReceiveWeights(version=version):
                self._paused = True
                self._changed.set()
                await asyncio.sleep(self._costs.publish_s)
                self._version, self._paused = version, False
                if not self._keep_kv:
                    self._owed_s += sum(self._prompt for _ in self._running) * self._costs.prefill_token_s
                self._changed.set()
        return Done()

    async def _generate(self, prompt: Prompt) -> Rollout:
        length = self._length_of(prompt.index)
        async with self._seats:
            version, future = self._version, asyncio.get_running_loop().create_future()
            self._prompt = len(prompt.token_ids)
            self._owed_s += self._prompt * self._costs.prefill_token_s
            heapq.heappush(self._running, (self._served + length, next(self._order), future))
            self._changed.set()
            await future
        return Rollout(
            index=prompt.index,
            prompt_ids=prompt.token_ids,
            response_ids=np.zeros(length, np.int32),
            segments=(Segment(first_token=0, version=version),),
            finish_reason="stop",
        )


@dataclass(slots=True)
class _Log:
    """Notes when each step ended, and what the roles had worked by then."""

    roles: list[_Role]
    times: list[float] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    worked: list[list[float]] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)
    size: int = 0  # bytes on disk

    def write(self, report: StepReport, seconds: dict[str, float], *, prompts: range, mean_length: float, stopped: float) -> None:
        """One step."""
        self.times.append(asyncio.get_running_loop().time())
        self.reports.append(report)
        self.worked.append([role.worked_s for role in self.roles])
        self.busy.append([role.busy_s for role in self.roles])

    def outcome(self, first: int, last: int) -> Outcome:
        """Between the ends of two steps."""
        span = self.times[last] - self.times[first]
        reports = self.reports[first + 1 : last + 1]
        tokens = sum(report.tokens for report in reports)
        return Outcome(
            step_s=span / (last - first),
            tokens_s=tokens / span,
            lag=sum(lag * count for report in reports for lag, count in report.lags.items()) / tokens,
            busy=self._shares(self.worked[first], self.worked[last], span),
            outstanding=self._shares(self.busy[first], self.busy[last], span),
        )

    def _shares(self, start: list[float], end: list[float], span: float) -> dict[str, float]:
        """Mean over the replicas of each role."""
        shares: dict[str, list[float]] = {}
        for role, before, after in zip(self.roles, start, end, strict=True):
            shares.setdefault(role.hello.role, []).append((after - before) / span)
        return {role: sum(values) / len(values) for role, values in shares.items()}


class _Hub:
    """Everyone is there from the start to the end."""

    def __init__(self, roles: list[_Role]) -> None:
        self._roles = roles
        self.changed = asyncio.Condition()

    def live(self, role: str) -> list[_Role]:
        """The replicas of a role."""
        return [one for one in self._roles if one.hello.role == role]

    def everyone(self) -> list[_Role]:
        """All roles."""
        return self._roles

    ever = everyone


class _NoRecovery:
    """A simulated run finds nothing and leaves nothing."""

    before = beginning("")
    set_aside_prompts = 0
    learner_folder = None
    digest = ""

    def due(self, version: int) -> bool:
        """Never."""
        return False

    def metrics(self, report: StepReport) -> dict[str, float | None]:
        """None."""
        return {}

    async def paid(self, step: int) -> Paid:
        """Nothing."""
        return Paid()

    async def keep(self, record: Rollout | TeacherScores) -> None:
        """Nowhere."""

    async def settle(self, version: int) -> None:
        """At once."""

    async def when_there_is_room(self, write: Callable[[], T]) -> T:
        """There always is."""
        return write()

    async def room_for_export(self) -> None:
        """At once."""


class _Prompts:
    """As long as prompts are on average."""

    def __init__(self, tokens: int) -> None:
        self._ids = np.zeros(tokens, np.int32)

    def prompt(self, index: int) -> Prompt:
        """The prompt at a cursor position."""
        return Prompt(index=index, token_ids=self._ids)


def simulate(config: Config, processes: tuple[Process, ...], costs: Costs, lengths: Lengths, max_lag: int) -> Outcome:
    """Runs the loop at a lag until it is steady, then for `plan.steps` steps, in whole rounds of `max_lag + 1`.

    The batches of a round start together and stay close to each other for a long time, so a part of a round is no mean. The
    last round is left out: nothing starts in it any more.
    """
    round_steps = max_lag + 1
    warm, counted = max(2, 2 * round_steps), -(-config.plan.steps // round_steps) * round_steps
    loop = replace(config.loop, max_lag=max_lag, steps=warm + counted + round_steps, export_every=0, exact_lag=False)
    made = replace(config, loop=loop, guard=GuardConfig(length_growth=0, support_mass=0))
    clock = _Clock()
    events = asyncio.SelectorEventLoop(clock)
    events.time = lambda: clock.now  # type: ignore[method-assign]
    try:
        log = events.run_until_complete(_run(made, processes, costs, lengths))
    finally:
        events.close()
    return log.outcome(warm - 1, warm - 1 + counted)


async def _run(config: Config, processes: tuple[Process, ...], costs: Costs, lengths: Lengths) -> _Log:
    sites: dict[object, _Site] = {}

    def site(process: Process) -> _Site:
        key = (process.node, process.cores) if process.cores else process.name
        return sites.setdefault(key, _Site())

    firsts = {(process.role, process.replica): process for process in processes if process.rank == 0}
    learner = _Learner("learner", 0, costs, site(firsts["learner", 0]))
    teachers = [
        _Teacher(replica, costs, site(process), config.teacher.batch_tokens, config.teacher.gather_s)
        for (role, replica), process in firsts.items()
        if role == "teacher"
    ]
    holder = "learner" if config.run.colocated else "rollout"  # of the devices that engines run on
    engines = [
        _Engine(replica, costs, site(process), _draw(lengths, config.run.seed), config.rollout.keep_kv)
        for (role, replica), process in firsts.items()
        if role == holder
    ]
    turns = [asyncio.create_task(role.turn()) for role in (*teachers, *engines)]
    log = _Log([learner, *engines, *teachers])
    hub: Any = _Hub(log.roles)
    rollouts = Samplers(hub, learner, width=1, timeout_s=config.run.peer_timeout_s, replaced_within_s=0) if engines else None
    roles = Roles(hub=hub, learner=learner, rollouts=rollouts, teachers=Fleet(hub, "teacher", replaced_within_s=0) if teachers else None)
    prompts: Any = _Prompts(max(1, round(lengths.prompt)))
    limits = Limits(vocab_size=1, response_tokens=lengths.longest)
    try:
        await Controller(config, prompts, roles, log, _NoRecovery(), limits).run("", asyncio.Event())  # type: ignore[arg-type]
    finally:
        for turn in turns:
            turn.cancel()
    return log


def _draw(lengths: Lengths, seed: int) -> Callable[[int], int]:
    """Lengths by index: log-normal with the mean that is wanted, cut at the longest."""
    centre = np.log(lengths.response) - lengths.spread**2 / 2

    def length(index: int) -> int:
        drawn = np.random.default_rng((seed, index)).lognormal(centre, lengths.spread)
        return int(np.clip(round(drawn), 1, lengths.longest))

    return length
