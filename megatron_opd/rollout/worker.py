"""What lives inside vLLM's worker: the receiving end of weight updates, and the calls that the rollout engine makes there.

vLLM imports this module through `worker_extension_cls` before it loads the model; importing it registers the weight
transfer engine "megatron_opd" in the importing process.
"""

import os
import select
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.config import ModelConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_opd.errors import WeightSyncError
from megatron_opd.rollout.draws import DrawRecorder
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.types import Address
from megatron_opd.weights.transport import BroadcastReceiver

BACKEND = "megatron_opd"
EXTENSION = "megatron_opd.rollout.worker.WorkerExtension"


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Where to join: `types.JoinTransport` in the plain types that vLLM's wire knows."""

    host: str
    port: int
    first_rank: int
    world_size: int
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Which update to receive; the manifest comes from the sender itself."""

    version: int


class BroadcastWeightEngine(WeightTransferEngine[JoinInfo, UpdateInfo]):
    """Feeds a broadcast of Hugging Face tensors into vLLM's layerwise reload.

    The reload packs, fuses and quantises each layer as soon as its tensors are there, and needs generation to be paused:
    between start and finish parameters live on the meta device.
    """

    init_info_cls = JoinInfo
    update_info_cls = UpdateInfo
    _receiver: BroadcastReceiver | None = None

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Joins the sender's rendezvous as rank `first_rank` + this worker's rank."""
        self.shutdown()
        self._receiver = BroadcastReceiver(
            address=Address(host=init_info.host, port=init_info.port),
            rank=init_info.first_rank + self.parallel_config.rank,
            world_size=init_info.world_size,
            device=self.device.type,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Puts parameters on the meta device and wraps their loaders."""
        initialize_layerwise_reload(self.model)

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Loads the sender's update.

        Raises:
            WeightSyncError: see `BroadcastReceiver.receive`; the model is then half loaded and the engine must end.
        """
        if self._receiver is None:
            raise WeightSyncError(f"weights version {update_info.version}: this worker has joined no transport; call join_transport first")
        manifest = self._receiver.announced(update_info.version)
        self.model.load_weights(self._receiver.receive(update_info.version, manifest))

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Completes the reload."""
        finalize_layerwise_reload(self.model, self.model_config)
        _renew_tied_head(self.model, self.model_config, self.device)

    def shutdown(self) -> None:
        """Leaves the transport."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class WorkerExtension:
    """Calls of `VLLMRollout` into the worker; vLLM mixes this class into its own."""

    def opd_die_with(self, owner: int) -> int:
        """Ties this process's life to process `owner`, which started the engine; returns its own pid."""
        engine = os.getppid()
        die_with_parent(engine)
        if engine != owner:  # tensor parallel: owner -> engine -> worker, and no call reaches the engine process itself
            threading.Thread(target=_kill_after, args=(engine, owner), daemon=True).start()
        return os.getpid()

    def opd_take_draws(self, keys: list[str], lengths: list[int]) -> bytes:
        """See `DrawRecorder.take`."""
        return self._opd_recorder().take(keys, lengths)

    @torch.no_grad()
    def opd_load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Loads full tensors that this very process hands over, between two steps."""
        self.reload_weights(weights_iterator=tensors, is_checkpoint_format=True)
        _renew_tied_head(self.get_model(), self.model_config, self.device)

    def _opd_recorder(self) -> DrawRecorder:
        return next(p for p in self.model_runner.input_batch.logitsprocs.all if isinstance(p, DrawRecorder))


def _renew_tied_head(model: torch.nn.Module, config: ModelConfig, device: torch.device) -> None:
    """On CPU a tied head computes from a packed copy of the embedding, which a reload leaves stale."""
    if device.type == "cpu" and config.hf_text_config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _kill_after(engine: int, owner: int) -> None:
    """Waits for process `owner` to end, then kills process `engine`."""
    try:
        select.select([os.pidfd_open(owner)], [], [])
    finally:
        os.kill(engine, signal.SIGKILL)


WeightTransferEngineFactory.register_engine(BACKEND, BroadcastWeightEngine)
