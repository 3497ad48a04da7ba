"""The one file that lets unmodified Megatron-Core run on CPU. It answers Megatron alone: other callers keep the torch they know.

Megatron-Core names the device "cuda" in some 120 places and has no setting for another. Nothing here computes; each
answer says only "the device is the CPU". Read with megatron-core 0.16.1.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings, random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_CPU = torch.device("cpu")
_GATHER, _REDUCE_SCATTER = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim


def install() -> None:
    """Makes this process one where Megatron-Core's "cuda" means the CPU; to be called in each thread that runs it, once or more often.

    It answers, and why:
        torch.cuda.current_device: the device of communication buffers, RoPE frequencies and optimizer state.
        torch.cuda.synchronize: called after every pipeline hand-over; a CPU has nothing in flight.
        torch.cuda.manual_seed, get_rng_state, and Megatron's own getter and setter of the generator: the tracker that
            forks the generator per tensor-parallel rank and activation recompute both swap its state. They get the
            CPU's default generator.
        `device="cuda"`, `Tensor.cuda()`: schedules, gradient clipping and tied embeddings create or move tensors there.
        `Tensor.type()`: the optimizers accept parameters of type torch.cuda.*Tensor only.

        the dispatcher of tokens to experts: it copies counts to the host on a stream of its own. They are there already.
        gathering and scattering of uneven pieces, which experts over tensor and expert ranks do: gloo takes even ones alone.
        the router of experts: without Transformer Engine it reads a name that nobody defined; None means torch's product.

    What needs no answer because it stays off on CPU: fused kernels and Transformer Engine. Elsewhere streams are not asked
    for: gradient reduction and parameter gathering overlap with compute by asynchronous collectives alone.
    """
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.synchronize = _synchronize
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = _get_rng_state
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    moe_utils.te_general_gemm = None
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"  # anything but None: None makes it ask for a stream
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_are_here
    mappings._gather_along_first_dim = _gather
    mappings._reduce_scatter_along_first_dim = _reduce_scatter
    if not any(isinstance(mode, _CudaMeansCpu) for mode in _get_current_function_mode_stack()):
        _CudaMeansCpu().__enter__()


def _current_device() -> torch.device:
    return _CPU


def _synchronize(device: Any = None) -> None:
    return None


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _counts_are_here(dispatcher: MoEAlltoAllTokenDispatcher, point: str, counts: torch.Tensor | None = None) -> torch.Tensor | None:
    """Leaves numpy arrays where the dispatcher's own copies to the host do."""
    for name in ("input_splits", "output_splits", "output_splits_tp"):
        splits = getattr(dispatcher, name)
        if isinstance(splits, torch.Tensor):
            setattr(dispatcher, name, splits.numpy())
    return counts


def _gather(piece: torch.Tensor, group: ProcessGroup, sizes: Sequence[int] | None = None, buffered: bool = False) -> torch.Tensor:
    """Megatron's own, of pieces that are padded to the longest where they are uneven."""
    if sizes is None or group.size() == 1:
        return _GATHER(piece, group, None, buffered)
    if not max(sizes):
        return piece
    padded = _GATHER(_padded(piece, max(sizes)), group, None, buffered).chunk(group.size())
    return torch.cat([whole[:size] for whole, size in zip(padded, sizes, strict=True)])


def _reduce_scatter(whole: torch.Tensor, group: ProcessGroup, sizes: Sequence[int] | None = None, buffered: bool = False) -> torch.Tensor:
    """The inverse of `_gather`."""
    if sizes is None or group.size() == 1:
        return _REDUCE_SCATTER(whole, group, None, buffered)
    if not max(sizes):
        return whole
    padded = torch.cat([_padded(piece, max(sizes)) for piece in whole.split(list(sizes))])
    return _REDUCE_SCATTER(padded, group, None, buffered)[: sizes[group.rank()]]


def _padded(piece: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([piece, piece.new_zeros(size - len(piece), *piece.shape[1:])])


class _CudaMeansCpu(TorchFunctionMode):
    """Sees every torch call of its thread, so the way through for an ordinary one is two lookups."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if kwargs is None:
            kwargs = {}
        elif "device" in kwargs and _is_cuda(kwargs["device"]) and _megatron_asks():
            kwargs = {**kwargs, "device": _CPU}
        if func in _ANSWERED and _megatron_asks():
            return _ANSWERED[func](*args, **kwargs)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _megatron_asks() -> bool:
    """Whether the frame that called torch belongs to Megatron: two Python frames above this one."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


def _type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    asked = args or kwargs
    return tensor.type(*args, **kwargs) if asked else tensor.type().replace("torch.", "torch.cuda.")


def _cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    given: Any = [_CPU if _is_cuda(arg) else arg for arg in args]
    return tensor.to(*given, **kwargs)


_ANSWERED: dict[Callable, Callable] = {torch.Tensor.type: _type, torch.Tensor.cuda: _cuda, torch.Tensor.to: _to}
