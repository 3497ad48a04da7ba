"""What lives inside vLLM's worker: the receiving end of weight updates, and the calls that the rollout engine makes there.

vLLM mixes `WorkerExtension` into its worker. Every call runs between two steps of the engine, so none may take long: an update is
received, verified and loaded by a thread beside the one that generates, and the engine asks now and then whether it is done.
"""

import os
import select
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import torch
from transformers import AutoConfig
from vllm.config import VllmConfig, set_current_vllm_config

from megatron_opd.errors import WeightSyncError
from megatron_opd.rollout.draws import DrawRecorder
from megatron_opd.rollout.shadow import Shadow
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.types import Address
from megatron_opd.weights.mapping import hf_manifest
from megatron_opd.weights.stages import StagedReceiver

EXTENSION = "megatron_opd.rollout.worker.WorkerExtension"


class Staging:
    """The next weights of one worker."""

    def __init__(self, receiver: StagedReceiver, model: torch.nn.Module, config: VllmConfig, device: torch.device) -> None:
        self._receiver = receiver
        self._model = model
        self._config = config
        self._device = device
        self._wanted = hf_manifest(AutoConfig.from_pretrained(config.model_config.model), "float32")
        self._coming: Future[Shadow] | None = None

    def begin(self, version: int) -> None:
        """Starts to receive an update in a thread; returns at once."""
        self._coming = Future()
        threading.Thread(target=self._fetch, args=(version, self._coming), daemon=True).start()

    def ready(self) -> bool:
        """Whether all of it is there, verified and loaded.

        Raises:
            WeightSyncError: see `StagedReceiver`; the live weights are untouched.
        """
        assert self._coming is not None, "an update is begun before it is asked for"
        if not self._coming.done():
            return False
        self._coming.result()
        return True

    def swap(self) -> None:
        """Makes the new weights the live ones; the old ones are given back to the system beside generation, it takes a while."""
        assert self._coming is not None, "an update is begun before it is swapped in"
        shadow, self._coming = self._coming.result(), None
        shadow.swap()
        threading.Thread(target=shadow.forget, daemon=True).start()

    def close(self) -> None:
        """Leaves the transport."""
        self._receiver.close()

    def _fetch(self, version: int, result: Future[Shadow]) -> None:
        """The thread's outermost line: whatever goes wrong is handed to the one who asks."""
        try:
            update = self._receiver.announced(version, self._wanted)
            with set_current_vllm_config(self._config):
                shadow = Shadow(self._model, self._device)
                shadow.load(self._receiver.receive(update))
        except BaseException as error:
            result.set_exception(error)
            raise
        result.set_result(shadow)


class WorkerExtension:
    """Calls of `VLLMRollout` into the worker; vLLM mixes this class into its own."""

    _opd_staging: Staging | None = None

    def opd_die_with(self, owner: int) -> int:
        """Ties this process's life to process `owner`, which started the engine; returns its own pid."""
        engine = os.getppid()
        die_with_parent(engine)
        if engine != owner:  # tensor parallel: owner -> engine -> worker, and no call reaches the engine process itself
            threading.Thread(target=_kill_after, args=(engine, owner), daemon=True).start()
        return os.getpid()

    def opd_join(self, host: str, port: int, first_rank: int, world_size: int, timeout_s: float) -> None:
        """Joins the sender's rendezvous as rank `first_rank` + this worker's rank; leaves one that it joined before.

        Raises:
            WeightSyncError: nobody listens there.
        """
        if self._opd_staging is not None:
            self._opd_staging.close()
        receiver = StagedReceiver(
            address=Address(host=host, port=port),
            rank=first_rank + self.rank,
            world_size=world_size,
            device=self.device.type,
            timeout_s=timeout_s,
        )
        self._opd_staging = Staging(receiver, self.model_runner.get_model(), self.vllm_config, self.device)

    def opd_begin_update(self, version: int) -> None:
        """See `Staging.begin`.

        Raises:
            WeightSyncError: this worker has joined no transport.
        """
        if self._opd_staging is None:
            raise WeightSyncError(f"weights version {version}: this worker has joined no transport; call join_transport first")
        self._opd_staging.begin(version)

    def opd_update_ready(self) -> bool:
        """See `Staging.ready`."""
        return self._opd_staging.ready()

    def opd_swap(self) -> None:
        """See `Staging.swap`; generation must be paused."""
        self._opd_staging.swap()

    def opd_take_draws(self, keys: list[str], lengths: list[int]) -> bytes:
        """See `DrawRecorder.take`."""
        return self._opd_recorder().take(keys, lengths)

    def opd_load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Loads full tensors that this very process hands over, between two steps."""
        shadow = Shadow(self.get_model(), self.device)
        with set_current_vllm_config(self.vllm_config):
            shadow.load(tensors)
        shadow.swap()
        shadow.forget()

    def _opd_recorder(self) -> DrawRecorder:
        return next(p for p in self.model_runner.input_batch.logitsprocs.all if isinstance(p, DrawRecorder))


def _kill_after(engine: int, owner: int) -> None:
    """Waits for process `owner` to end, then kills process `engine`."""
    try:
        select.select([os.pidfd_open(owner)], [], [])
    finally:
        os.kill(engine, signal.SIGKILL)
