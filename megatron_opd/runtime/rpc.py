"""Requests from the controller to the roles, over ZeroMQ with CURVE keys made for the run.

The controller binds one ROUTER socket (`Hub`); every role connects a DEALER (`Desk`) and says Hello. Only the controller
asks, only roles answer. Frames: request id, kind (hello | ask | probe | answer | setback | failure), message name, message body.
A Hello has the schema of all messages for an id, and its sender for a name. A setback is a failure that its role survives. Probes
say nothing: they find out whether a connection still stands.
"""

import asyncio
import errno
import itertools
import json
import logging
import os
import socket as sockets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from megatron_opd.errors import ConfigError, HungUpError, PeerError, SetbackError, WireError
from megatron_opd.runtime import whole, wire
from megatron_opd.types import Address, Hello

_LOG = logging.getLogger(__name__)
_ZAP = "inproc://zeromq.zap.01"  # where libzmq looks for the authenticator of a context
_MAX_MESSAGE_BYTES = 16 << 30
_PROBE_S = 0.5


def make_keys(folder: Path) -> None:
    """Writes a key pair for the controller and one for all roles into a folder that only its owner may read."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("controller", "role"):
        zmq.auth.create_certificates(folder, name)


class Peer:
    """One role as the controller sees it."""

    def __init__(self, hub: "Hub", identity: bytes, hello: Hello) -> None:
        self.hello = hello
        self.name = _title(hello)
        self.outstanding = 0
        self.busy_s = 0.0  # wall seconds with at least one request outstanding
        self.lost = ""  # why nobody may ask it any more
        self._hub = hub
        self._identity = identity
        self._busy_since = 0.0
        self._heard = 0.0  # when it last answered anything

    async def call(self, message: object, timeout_s: float) -> Any:
        """The role's answer. Its time is out when the role has answered nothing at all for `timeout_s`: a request may queue behind others.

        Raises:
            PeerError: the role reports a failure, vanished, or did not answer in time.
            SetbackError: the role reports a failure that it survives.
        """
        if self.outstanding == 0:
            self._busy_since = time.monotonic()
        self.outstanding += 1
        asked = time.monotonic()
        answer = asyncio.ensure_future(self._hub._ask(self, message))
        try:
            while not answer.done():
                left_s = max(asked, self._heard) + timeout_s - time.monotonic()
                if left_s <= 0:
                    raise PeerError(
                        f"{self.name} did not answer {type(message).__name__}, nor anything else, within {timeout_s:g} s; see its log"
                    )
                await asyncio.wait({answer}, timeout=left_s)
            return answer.result()
        finally:
            answer.cancel()
            self.outstanding -= 1
            if self.outstanding == 0:
                self.busy_s += time.monotonic() - self._busy_since


class Hub:
    """The controller's socket. Use as an async context manager; its reader task wakes the callers."""

    def __init__(self, keys: Path, host: str, port: int, *, silent_s: float = 30.0, on_loss: Callable[[Peer], None] | None = None) -> None:
        """A role whose connection breaks, or is silent for `silent_s`, counts as lost; `on_loss` is told of each."""
        context = zmq.asyncio.Context.instance()
        self._authenticator = AsyncioAuthenticator(context)
        self._keys, self._host = keys, host
        self._socket = context.socket(zmq.ROUTER)
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.auth.load_certificate(keys / "controller.key_secret")
        self._socket.curve_server = True
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        _set_up(self._socket, silent_s)
        self._on_loss = on_loss
        self._peers: dict[bytes, Peer] = {}
        self.changed = asyncio.Condition()  # notified whenever a peer comes, is refused or is lost
        self.refused = ""  # why the last one that was refused was
        self._answers: dict[bytes, tuple[Peer, asyncio.Future]] = {}
        self._ids = itertools.count()
        self._notices: set[asyncio.Task] = set()
        try:
            self._socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ConfigError(
                f"run.host={host} run.port={port} cannot be bound: {error}; choose another port, or 0 for a free one"
            ) from error
        self.address = Address(host=host, port=int(self._socket.last_endpoint.decode().rsplit(":", 1)[1]))

    async def __aenter__(self) -> Self:
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OneKey(self._keys / "role.key"))
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(self._fail_all)
        self._prober = asyncio.create_task(self._probe())
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.cancel()
        self._prober.cancel()
        if self._authenticator.zap_socket is not None:
            self._authenticator.zap_socket.unbind(_ZAP)  # at once, whereas closing frees the address some time later
        self._authenticator.stop()
        self._socket.close()

    async def peers(self, role: str, count: int, timeout_s: float) -> list[Peer]:
        """All replicas of a role, once they have said Hello.

        Raises:
            PeerError: some did not come in time, and the message says which; or one speaks another version's messages.
        """
        try:
            async with asyncio.timeout(timeout_s), self.changed:
                await self.changed.wait_for(lambda: self.refused or len(self.live(role)) >= count)
            if self.refused:
                raise PeerError(self.refused)
        except TimeoutError:
            missing = sorted(set(range(count)) - {p.hello.replica for p in self.live(role)})
            raise PeerError(f"{role} {missing} did not report within {timeout_s:g} s; see the log of each") from None
        return self.live(role)

    def live(self, role: str) -> list[Peer]:
        """The replicas of a role that have come and are not lost, in order."""
        return sorted((p for p in self._peers.values() if p.hello.role == role and not p.lost), key=lambda p: p.hello.replica)

    def everyone(self) -> list[Peer]:
        """All that are not lost."""
        return [peer for peer in self._peers.values() if not peer.lost]

    def ever(self) -> list[Peer]:
        """All that have come, lost ones too."""
        return list(self._peers.values())

    def dismiss(self) -> None:
        """From now on roles may end: nobody is told of a loss any more."""
        self._on_loss = None

    def lose(self, peer: Peer, reason: str) -> None:
        """Nobody asks this peer any more, and who waits for it learns why."""
        if not peer.lost:
            self._fail(peer, reason)
            if self._on_loss is not None:
                self._on_loss(peer)

    def _fail(self, peer: Peer, reason: str) -> None:
        peer.lost = reason
        for owner, answer in self._answers.values():
            if owner is peer and not answer.done():
                answer.set_exception(PeerError(reason))
        self._notices.add(notice := asyncio.create_task(self._notify()))
        notice.add_done_callback(self._notices.discard)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _probe(self) -> None:
        """A ROUTER keeps silent about connections that break, until something is to be sent over them."""
        suspects: set[Peer] = set()
        while True:
            for peer in self.everyone():
                try:
                    await self._socket.send_multipart([peer._identity, b"", b"probe", b"", b""])
                except zmq.ZMQError as error:
                    if error.errno != errno.EHOSTUNREACH:
                        raise
                    if peer in suspects:  # at the first time an answer may still wait to be read
                        self.lose(peer, f"{peer.name} is gone; see its log")
                    suspects.add(peer)
            await asyncio.sleep(_PROBE_S)

    async def _ask(self, peer: Peer, message: object) -> Any:
        if self._reader.done():
            raise PeerError(f"{peer.name} cannot be asked: this process no longer reads answers")
        if peer.lost:
            raise PeerError(peer.lost)
        number = next(self._ids).to_bytes(8, "big")
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = peer, answer
        try:
            await self._socket.send_multipart([peer._identity, number, b"ask", *wire.encode(message)], copy=False)
            return await answer
        except zmq.ZMQError as error:
            del self._answers[number]  # this one is told by what is raised here
            self.lose(peer, f"{peer.name} is gone: {error}")
            raise PeerError(peer.lost) from error
        finally:
            self._answers.pop(number, None)

    def _fail_all(self, reader: asyncio.Task) -> None:
        """No caller waits for a reader that died."""
        error = None if reader.cancelled() else reader.exception()
        for _, answer in self._answers.values():
            if error is not None and not answer.done():
                answer.set_exception(error)

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 5:
                continue  # nothing that a role says
            identity, number, kind, name, body = frames
            if kind == b"hello":
                await self._welcome(identity, number, name, body)
                continue
            if identity in self._peers:
                self._peers[identity]._heard = time.monotonic()
            peer, answer = self._answers.get(number, (None, None))
            if answer is None or answer.done() or peer._identity != identity:
                continue
            if kind == b"answer":
                try:
                    answer.set_result(wire.decode(name, body))
                except WireError as error:
                    answer.set_exception(PeerError(f"{peer.name} answered what cannot be read: {error}"))
            else:
                error = SetbackError if kind == b"setback" else PeerError
                answer.set_exception(error(f"{peer.name}: {body.decode()}"))

    async def _welcome(self, identity: bytes, schema: bytes, name: bytes, body: bytes) -> None:
        if schema != wire.SCHEMA:
            self.refused = (
                f"{name.decode()} has messages of schema {schema.decode() or 'none'}, this controller has {wire.SCHEMA.decode()}; "
                "install the same version of megatron_opd for all roles, on all nodes"
            )
            _LOG.error(self.refused)
            return await self._notify()
        try:
            peer = Peer(self, identity, wire.decode(b"Hello", body))
        except WireError as error:
            return _LOG.error("a role's first message is dropped: %s", error)
        for other in self.live(peer.hello.role):
            if other.hello.replica == peer.hello.replica:
                self._fail(other, f"{other.name} was replaced by {peer.name}")
        self._peers[identity] = peer
        await self._notify()


class _OneKey:
    """Admits the one key that all roles of this run share."""

    def __init__(self, path: Path) -> None:
        self._key = zmq.auth.load_certificate(path)[0]

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


class Desk:
    """A role's socket: requests come in, answers go out. Blocking."""

    def __init__(self, keys: Path, address: Address, hello: Hello, *, silent_s: float = 30.0, context: zmq.Context | None = None) -> None:
        """A controller that is silent for `silent_s` counts as gone."""
        self._socket, self._monitor = _dial(context or zmq.Context.instance(), keys, address, silent_s)
        self._address = address
        self._hello = hello

    def greet(self) -> None:
        """Says Hello: from now on the controller may ask."""
        self._socket.send_multipart(_greeting(self._hello))

    def receive(self, gather_s: float = 0.0) -> list[tuple[bytes, Any]]:
        """Waits for a request, then `gather_s` for more; returns all that have come by then, as (number, message).

        Raises:
            HungUpError: the controller is gone.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        if self._socket not in dict(poller.poll()):
            raise _gone(self._address)
        time.sleep(gather_s)
        requests = []
        while self._socket.poll(0):
            if (request := _request(self._socket.recv_multipart())) is not None:
                requests.append(request)
        return requests

    def answer(self, number: bytes, message: object) -> None:
        """Sends the answer to a request."""
        self._socket.send_multipart(_answer(number, message), copy=False)

    def fail(self, number: bytes, reason: str, *, setback: bool = False) -> None:
        """Tells the controller that a request failed, why, and whether this role goes on."""
        self._socket.send_multipart(_failure(number, reason, b"setback" if setback else b"failure"))

    def close(self) -> None:
        """Flushes answers (for a second at most) and closes."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


def ready(desks: Sequence[Desk], *, wait: bool) -> list[Desk]:
    """Those of several desks that have a request or have lost the controller; with `wait`, as soon as there is one."""
    poller = zmq.Poller()
    for desk in desks:
        poller.register(desk._socket, zmq.POLLIN)
        poller.register(desk._monitor, zmq.POLLIN)
    events = dict(poller.poll(None if wait else 0))
    return [desk for desk in desks if desk._socket in events or desk._monitor in events]


class AsyncDesk:
    """The same for a role that answers many requests at once. asyncio must own the socket: zmq wakes a foreign poller only once."""

    def __init__(self, keys: Path, address: Address, hello: Hello, *, silent_s: float = 30.0) -> None:
        """See `Desk`."""
        self._socket, self._monitor = _dial(zmq.asyncio.Context.instance(), keys, address, silent_s)
        self._address = address
        self._hello = hello

    async def greet(self) -> None:
        """Says Hello: from now on the controller may ask."""
        await self._socket.send_multipart(_greeting(self._hello))

    async def requests(self) -> AsyncIterator[tuple[bytes, Any]]:
        """(number, message) of each request as it comes, for ever.

        Raises:
            HungUpError: the controller is gone.
        """
        hung_up = asyncio.ensure_future(self._monitor.recv_multipart())
        try:
            while True:
                frames = asyncio.ensure_future(self._socket.recv_multipart())
                await asyncio.wait({frames, hung_up}, return_when=asyncio.FIRST_COMPLETED)
                if not frames.done():
                    frames.cancel()
                    raise _gone(self._address)
                if (request := _request(frames.result())) is not None:
                    yield request
        finally:
            hung_up.cancel()

    async def answer(self, number: bytes, message: object) -> None:
        """Sends the answer to a request."""
        await self._socket.send_multipart(_answer(number, message), copy=False)

    async def fail(self, number: bytes, reason: str, *, setback: bool = False) -> None:
        """Tells the controller that a request failed, why, and whether this role goes on."""
        await self._socket.send_multipart(_failure(number, reason, b"setback" if setback else b"failure"))

    def close(self) -> None:
        """Flushes answers (for a second at most) and closes."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


def _set_up(socket: zmq.Socket, silent_s: float) -> None:
    """What both ends have in common."""
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, round(silent_s * 1000 / 3))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(silent_s * 1000 * 2 / 3))


def _dial(context: zmq.Context, keys: Path, address: Address, silent_s: float) -> tuple[zmq.Socket, zmq.Socket]:
    """A DEALER to the controller, and the socket that tells when the connection breaks."""
    dealer = context.socket(zmq.DEALER)
    dealer.curve_serverkey = zmq.auth.load_certificate(keys / "controller.key")[0]
    dealer.curve_publickey, dealer.curve_secretkey = zmq.auth.load_certificate(keys / "role.key_secret")
    _set_up(dealer, silent_s)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    dealer.connect(f"tcp://{address.host}:{address.port}")
    return dealer, monitor


def _greeting(hello: Hello) -> list[bytes]:
    return [wire.SCHEMA, b"hello", _title(hello).encode(), wire.encode(hello)[1]]


def _title(hello: Hello) -> str:
    return f"{hello.role} {hello.replica} (pid {hello.pid} on {hello.host})"


def _request(frames: list[bytes]) -> tuple[bytes, Any] | None:
    """None for a probe."""
    number, kind, name, body = frames
    return (number, wire.decode(name, body)) if kind == b"ask" else None


def _answer(number: bytes, message: object) -> list[bytes]:
    return [number, b"answer", *wire.encode(message)]


def _failure(number: bytes, reason: str, kind: bytes = b"failure") -> list[bytes]:
    return [number, kind, b"", reason.encode()]


def _gone(address: Address) -> HungUpError:
    return HungUpError(f"the controller at {address.host}:{address.port} closed the connection; see its log")


def publish_address(file: Path, address: Address) -> None:
    """Writes an address where the other roles of the run look for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole.write(file, json.dumps({"host": address.host, "port": address.port}).encode())


def await_address(file: Path, timeout_s: float) -> Address:
    """The address that another role publishes.

    Raises:
        PeerError: it does not appear in time.
    """
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() > deadline:
            raise PeerError(f"no address in {file} after {timeout_s:g} s; did the role that writes it start?")
        time.sleep(0.05)
    found = json.loads(file.read_text())
    return Address(host=found["host"], port=found["port"])


def hello(role: str, replica: int) -> Hello:
    """Who this process is."""
    return Hello(role=role, replica=replica, pid=os.getpid(), host=sockets.gethostname())
