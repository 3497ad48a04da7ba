"""Replicas that may die: who of a role can be asked, and who samples from which weights. It knows requests, not what they are about.

A request goes to the least busy replica that is ready. If that one is lost on the way, another gets it, or a new one that
the launcher starts in its place: nobody but the caller of `ask` waits meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from typing import Any

from megatron_opd.errors import LearnerLostError, PeerError, SetbackError, UnfitError
from megatron_opd.runtime.rpc import Hub, Peer
from megatron_opd.types import Address, HostTransport, JoinTransport, ReceiveWeights, SendWeights
from megatron_opd.weights.transport import report_loss

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 5  # to bring one version of the weights to those that are there
_SUSPECT_AFTER = 2  # replicas lost with a request under way: it may be what they die of
_GUILTY_AFTER = 2  # more, lost while it was alone on them
_POLL_S = 0.05


class Fleet:
    """The replicas of one role, ready as soon as they have come."""

    def __init__(self, hub: Hub, role: str, *, replaced_within_s: float) -> None:
        """A lost replica is waited for so long if no other is left; 0: nothing is replaced, and the first loss is the caller's."""
        self._hub = hub
        self._role = role
        self._replaced_within_s = replaced_within_s
        self._trial = asyncio.Lock()
        self._apart: Peer | None = None  # who is for a suspect alone
        self._found = 0  # requests that replicas die of

    async def ask(self, message: object, timeout_s: float) -> Any:
        """The answer of the least busy replica, or of another one if that one is lost.

        What was under way on the second replica that is lost with it is suspect: one of it is what they die of, perhaps. Suspects begin
        again one by one, alone on a replica, until one is found guilty. That one has lived equally long each time, so it waits least.

        Raises:
            UnfitError: replicas die of this request.
            PeerError: none is left, or replicas are not replaced.
        """
        while True:
            lives = []
            while len(lives) < _SUSPECT_AFTER:
                peer, asked = await self.free(), time.monotonic()
                try:
                    return await peer.call(message, timeout_s)
                except PeerError as error:
                    self._give_up(peer, error)
                    lives.append(time.monotonic() - asked)
            found = self._found
            await asyncio.sleep(max(lives) - min(lives))
            async with self._trial:
                if self._found == found:
                    return await self._try(message, timeout_s)

    async def _try(self, message: object, timeout_s: float) -> Any:
        reason = ""
        for _ in range(_GUILTY_AFTER):
            try:
                peer = await self._alone()
                try:
                    return await peer.call(message, timeout_s)
                except PeerError as error:
                    self._give_up(peer, error)
                    reason = str(error)
            finally:
                self._apart = None
        self._found += 1
        raise UnfitError(
            f"{_SUSPECT_AFTER} {self._role}s were lost with it, and {_GUILTY_AFTER} more that had nothing else to do: {reason}"
        )

    async def _alone(self) -> Peer:
        """A replica that has nothing to do, and gets nothing else while it is `_apart`."""
        while True:
            self._apart = peer = await self.free()
            while peer.outstanding and not peer.lost:
                await asyncio.sleep(_POLL_S)
            if not peer.lost:
                return peer
            self._apart = None

    def _give_up(self, peer: Peer, error: PeerError) -> None:
        """A replica that failed once is not asked again: it is ending, or hangs.

        Raises:
            PeerError: replicas are not replaced.
        """
        if not self._replaced_within_s:
            raise error
        _LOG.warning("what was asked of it goes to another %s: %s", self._role, error)
        self._hub.lose(peer, str(error))

    def _ready(self) -> list[Peer]:
        return self._hub.live(self._role)

    async def free(self) -> Peer:
        """The least busy replica, as soon as there is one.

        Raises:
            PeerError: none came in time.
        """
        while not (ready := [peer for peer in self._ready() if peer is not self._apart]):
            await (asyncio.sleep(_POLL_S) if self._ready() else self._replacement())
        return min(ready, key=lambda peer: peer.outstanding)

    async def _replacement(self) -> None:
        """Waits until one is ready, or has come and is being made so, or is lost again."""
        if not self._replaced_within_s:
            raise PeerError(f"no {self._role} is left; see the logs of the {self._role}s")
        coming = bool(self._hub.live(self._role))  # it may have to wait for the weights until a long step is over
        try:
            async with asyncio.timeout(None if coming else self._replaced_within_s), self._hub.changed:
                await self._hub.changed.wait_for(lambda: self._ready() or bool(self._hub.live(self._role)) != coming)
        except TimeoutError:
            raise PeerError(
                f"no {self._role} is left, and none was started in {self._replaced_within_s:g} s; "
                f"{self._hub.refused or f'see the logs of the {self._role}s'}"
            ) from None


class Seat:
    """The learner, and after it who takes its place."""

    def __init__(self, hub: Hub, role: str, *, replaced_within_s: float) -> None:
        """It must have come already. A lost one is waited for so long; 0: the first loss is nobody's to mend."""
        self._fleet = Fleet(hub, role, replaced_within_s=replaced_within_s)
        self._hub = hub
        (self.peer,) = hub.live(role)
        self._replaced = replaced_within_s > 0

    async def call(self, message: object, timeout_s: float) -> Any:
        """Its answer.

        Raises:
            LearnerLostError: it failed or vanished, and is replaced.
            SetbackError: it failed, and goes on.
            PeerError: it failed or vanished, and is not replaced.
        """
        try:
            return await self.peer.call(message, timeout_s)
        except SetbackError:
            raise
        except PeerError as error:
            if not self._replaced:
                raise
            self._hub.lose(self.peer, str(error))
            raise LearnerLostError(str(error)) from error

    async def successor(self) -> None:
        """Waits until another one has come.

        Raises:
            PeerError: none did in time.
        """
        self.peer = await self._fleet.free()


class Samplers(Fleet):
    """Rollout replicas: ready once they hold the learner's weights, which all of them receive together."""

    def __init__(self, hub: Hub, learner: Seat, *, width: int, timeout_s: float, replaced_within_s: float) -> None:
        """`width` workers of each replica receive; `timeout_s` is that of a single answer."""
        super().__init__(hub, "rollout", replaced_within_s=replaced_within_s)
        self._learner = learner
        self._width = width
        self._timeout_s = timeout_s
        self._sender: Address | None = None  # where the learner meets those of the group
        self._group: list[Peer] = []  # the learner, and whom the weight transport joins to it
        self._current: list[Peer] = []  # who has the last weights that were published

    def _ready(self) -> list[Peer]:
        return [peer for peer in self._current if not peer.lost]

    async def newcomer(self) -> None:
        """Waits until a replica is there that has no weights yet."""
        async with self._hub.changed:
            await self._hub.changed.wait_for(self.has_newcomers)

    def has_newcomers(self) -> bool:
        """Whether a replica is there that has no weights yet."""
        return not set(self._hub.live(self._role)) <= set(self._current)

    async def publish(self, version: int) -> dict[str, float]:
        """Streams the learner's weights into all replicas that are there; returns seconds by part, of the slowest replica.

        Raises:
            PeerError: the learner failed, or a replica that is not replaced, or no attempt succeeded.
        """
        for _ in range(_ATTEMPTS):
            members = self._hub.live(self._role)
            if not members:
                return {}
            try:
                if [self._learner.peer, *members] != self._group:
                    await self._join(members)
                seconds = await self._stream(version)
            except SetbackError as error:
                _LOG.warning("weights version %d are sent again, to those that are left: %s", version, error)
                self._group = []  # one that has lost a message cannot be mended
                continue
            self._current = members
            async with self._hub.changed:
                self._hub.changed.notify_all()
            return seconds
        raise PeerError(f"weights version {version} did not reach the rollouts in {_ATTEMPTS} attempts; see the logs of all rollouts")

    async def _join(self, members: list[Peer]) -> None:
        receivers = self._width * len(members)
        self._sender = address = await self._learner.call(HostTransport(receivers=receivers), self._timeout_s)
        joins = [JoinTransport(address=address, first_rank=1 + i * self._width, world_size=1 + receivers) for i in range(len(members))]
        await self._from_all({peer: peer.call(join, self._timeout_s) for peer, join in zip(members, joins, strict=True)})
        self._group = [self._learner.peer, *members]

    async def _stream(self, version: int) -> dict[str, float]:
        limit_s = 2 * self._timeout_s  # the two ends time out by themselves first, and know better whom they miss
        sent, received = await asyncio.gather(
            self._learner.call(SendWeights(version=version), limit_s),
            self._from_all({peer: self._receive(peer, version, limit_s) for peer in self._group[1:]}),
            return_exceptions=True,  # a new attempt starts once both ends are done with this one
        )
        failures = [end for end in (sent, received) if isinstance(end, BaseException)]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, SetbackError)):  # what nobody survives counts first
            raise failure
        slowest = max(received, key=lambda done: sum(done.seconds.values()))
        return {f"send.{k}": v for k, v in sent.seconds.items()} | {f"receive.{k}": v for k, v in slowest.seconds.items()}

    async def _receive(self, peer: Peer, version: int, limit_s: float) -> Any:
        """A replica's answer; the learner is told at once of one that will not come, or it would wait for it until its time is out."""
        try:
            return await peer.call(ReceiveWeights(version=version), limit_s)
        except PeerError as error:
            if not isinstance(error, SetbackError):
                await asyncio.to_thread(report_loss, self._sender, str(error))
            raise

    async def _from_all(self, calls: Mapping[Peer, Awaitable[Any]]) -> list[Any]:
        """The answers of all replicas.

        Raises:
            SetbackError: some failed; those that do not go on are lost now.
            PeerError: one of those, and replicas are not replaced.
        """
        answers = await asyncio.gather(*calls.values(), return_exceptions=True)
        failed = {peer: answer for peer, answer in zip(calls, answers, strict=True) if isinstance(answer, BaseException)}
        for peer, failure in failed.items():
            if not isinstance(failure, PeerError):
                raise failure
            if not isinstance(failure, SetbackError):
                self._give_up(peer, failure)
        if failed:
            raise SetbackError("; ".join(map(str, failed.values())))
        return answers
