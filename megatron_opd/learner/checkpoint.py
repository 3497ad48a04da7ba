"""The learner's state as a Megatron distributed checkpoint, by Megatron's own writer and loader. It knows no loop and no run.

Model, optimizer (float32 masters and moments) and counters stand in a format that any split of the model reads; the generators of
every rank too, which only the same split can use. All methods are collectives: every rank calls them in the same order.
"""

import gc
import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.errors import CheckpointError, UnsavedError
from megatron_opd.model.parallel import ParallelConfig, place
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.weights.checkpoint import DistributedCheckpoint

_LOG = logging.getLogger(__name__)
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


class TrainingState:
    """Model and optimizer of this rank, as they go to disk and come back."""

    def __init__(self, module: GPTModel, optimizer: ChainedOptimizer, parallel: ParallelConfig) -> None:
        self._module = module
        # One for what every replica holds, and where experts are split over ranks one for those. On disk no trace is left of that.
        self._dense, *self._experts = optimizer.chained_optimizers
        self._parallel = parallel
        self._writing: Path | None = None
        self._queue = AsyncCallsQueue()
        gc.freeze()  # Megatron collects garbage at every save; what is there by now lives on, and is not to be looked through each time

    def save(self, folder: Path, counters: dict[str, int]) -> None:
        """Begins to write into an empty folder; a forked process does it while training goes on. `finish` waits for it."""
        assert self._writing is None, f"{self._writing} is still being written"
        state = self._state(is_loading=False) | {"counters": counters, "layout": asdict(self._parallel)}
        _make_results_queue()
        with _named(folder):
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
            self._queue.schedule_async_request(request)
        self._writing = folder

    def finish(self) -> None:
        """Waits until what was begun is on disk on every rank.

        Raises:
            UnsavedError: on every rank: a writer failed, on a full disk for one. The folder is to be thrown away.
            CheckpointError: this rank failed alone.
        """
        assert self._writing is not None, "nothing is being written"
        folder, self._writing = self._writing, None
        with _named(folder):
            try:
                self._queue.maybe_finalize_async_calls(blocking=True)
            except CheckpointException as error:
                reasons = [f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
                raise UnsavedError(f"{folder} could not be written: {'; '.join(reasons) or 'another rank says why'}") from error

    def load(self, folder: Path) -> dict[str, int]:
        """Fills model and optimizer; returns the counters that were saved with them.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model.
        """
        DistributedCheckpoint(folder)  # reads the index, a pickle, with the classes of an index alone, and finds truncated files
        with _named(folder):
            common = dist_checkpointing.load_common_state_dict(str(folder))
            state = self._state(is_loading=True)
            if common["layout"] != asdict(self._parallel):
                _LOG.info("%s was written by the layout %s: the generators of its ranks are not restored", folder, common["layout"])
                del state["generators"]
            loaded = dist_checkpointing.load(state, str(folder))
        self._module.load_state_dict({name: tensor for name, tensor in loaded["model"].items() if name in state["model"]})
        for number, one in enumerate(self._experts):
            settings = _for_experts(loaded["optimizer"]["optimizer"])
            _load_optimizer(one, {**loaded["optimizer"], "optimizer": settings, "param_state": loaded["experts"][number]})
        _load_optimizer(self._dense, loaded["optimizer"])
        if "generators" in state:
            _restore_generators(loaded["generators"])
        return common["counters"]

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        optimizers = [self._dense, *self._experts]
        if is_loading:
            for one in optimizers:
                _make_moments(one.optimizer)
        model = self._module.sharded_state_dict(
            metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        )
        dense, *experts = (one.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE) for one in optimizers)
        moments = {number: one["param_state"] for number, one in enumerate(experts)}
        if is_loading:  # rows that pad the vocabulary are not on disk: they must not come back as whatever was in memory
            for held in nested_values({"dense": dense["param_state"], **moments}):
                assert isinstance(held, ShardedTensor | ShardedTensorFactory), f"optimizer state of type {type(held).__name__}"
                held.data.zero_()
        return {"model": model, "optimizer": dense, "experts": moments, "generators": _generators(self._parallel)}


def _make_results_queue() -> None:
    """The process that holds Megatron's queue of writers' results, as Megatron makes it, but so that it ends with this one."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=die_with_parent, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, CheckpointingException, CheckpointException) as error:
        raise CheckpointError(f"checkpoint {folder}: {type(error).__name__}: {error}") from error


def _load_optimizer(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Megatron fills whatever stands in a parameter's state, and torch's Adam keeps its step there (those of apex and TE do not)."""
    moments = state.pop("param_state")
    optimizer.load_state_dict(state)
    held = optimizer.optimizer.state
    steps = {parameter: entry.pop("step") for parameter, entry in held.items() if "step" in entry}
    optimizer.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        held[parameter]["step"] = step.clone()  # Megatron gave one tensor to all, and Adam counts in place


def _for_experts(settings: dict[str, Any]) -> dict[str, Any]:
    """Learning rate and step of the other optimizer, whose groups of parameters Megatron tells from these by a mark."""
    return {**settings, "param_groups": [{**group, "is_expert_parallel": True} for group in settings["param_groups"]]}


def _make_moments(adam: torch.optim.Optimizer) -> None:
    """torch's Adam makes its moments at the first step; a checkpoint is loaded before that."""
    if isinstance(adam, torch.optim.Adam):
        for group in adam.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state.setdefault(parameter, {"step": torch.tensor(0.0), **moments})


def _generators(parallel: ParallelConfig) -> ShardedObject:
    here = place()
    states = {"default": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    sizes = (parallel.pipeline, parallel.tensor, parallel.data)
    return ShardedObject("rng_state", states, sizes, (here.pipeline, here.tensor, here.data))


def _restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["default"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
