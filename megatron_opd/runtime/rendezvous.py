"""Where ranks meet: a torch TCPStore that listens on one address only, and on a port that was free; and what a far one is asked."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

_MARGIN_S = 5.0  # for an answer that says that nothing came
T = TypeVar("T")


def listening_store(host: str, timeout_s: float) -> dist.TCPStore:
    """A store on a free port of `host`. torch by itself would listen on every address of the machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=1024) as server:
        port = server.getsockname()[1]
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), master_listen_fd=server.detach()
        )


class FarStore:
    """The store of another process. torch waits for a frozen one for ever, whatever its timeouts say; here that takes `timeout_s` at most.

    All methods raise RuntimeError where the connection broke or no answer came.
    """

    def __init__(self, store: dist.TCPStore, timeout_s: float) -> None:
        self.store = store
        self._timeout_s = timeout_s

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return bounded(lambda: self.store.get(key), self._timeout_s)

    def set(self, key: str, value: str) -> None:
        """Puts a key down."""
        bounded(lambda: self.store.set(key, value), self._timeout_s)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return bounded(lambda: self.store.check(keys), self._timeout_s)

    def wait(self, keys: list[str]) -> None:
        """Returns when all keys are there."""
        bounded(lambda: self.store.wait(keys, timedelta(seconds=self._timeout_s)), self._timeout_s + _MARGIN_S)


def bounded(call: Callable[[], T], timeout_s: float) -> T:
    """What `call` returns or raises. It runs in a thread of its own, which is left behind if it takes longer.

    Raises:
        RuntimeError: it took longer.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout_s)
    except TimeoutError:
        raise RuntimeError(f"no answer within {timeout_s:g} s") from None
