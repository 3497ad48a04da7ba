"""The next weights, loaded beside those that generate, and the swap of the two. Knows vLLM's modules, no network.

Loading as vLLM does it at start, into a second set of tensors: each loader copies what it is given at once, then each layer is
processed for its kernels. vLLM's own reload works in the live modules, which cannot generate meanwhile; on CPU it also leaves two
things stale: a tied head, which computes from a packed copy of the embedding, and packed experts. Here nothing is left, since
everything that loading makes is made anew and changes hands together.
"""

import copy
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

from megatron_opd.errors import WeightSyncError

_ABSENT = object()


class Shadow:
    """A copy of a live model's module tree with parameters of its own; buffers and all else are shared. It never computes."""

    def __init__(self, live: nn.Module, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, nn.Module] = {}  # by id of the live module
        self._parameters: dict[int, Tensor] = {}  # by id of the live parameter: tied ones stay tied
        self._pairs: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []  # live, copy, the copy's attributes before loading
        self._model = self._copy(live)

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes a whole model under its Hugging Face names; each tensor is read before the next one is asked for.

        Raises:
            WeightSyncError: a parameter got no weights.
        """
        loaded = self._model.load_weights(weights)
        missing = sorted({name for name, _ in self._model.named_parameters()} - loaded)
        if missing:
            raise WeightSyncError(
                f"the update left {missing[0]} and {len(missing) - 1} more parameters of the engine's model without weights"
            )
        for _, module, _ in self._pairs:
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                method.process_weights_after_loading(module)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges what loading made with what the live modules have; on CUDA the bytes alone, since graphs hold their addresses."""
        for live, module, before in self._pairs:
            if self._device.type == "cuda":
                for name, parameter in live._parameters.items():
                    if parameter is not None:
                        parameter.data.copy_(module._parameters[name].data)
                continue
            made = {name: value for name, value in vars(module).items() if before.get(name, _ABSENT) is not value}
            for name, value in made.items():
                vars(module)[name] = vars(live).get(name)
                vars(live)[name] = value

    def forget(self) -> None:
        """Lets go of all tensors. The loaders of the live ones are bound to these copies, which must not hold those before."""
        for _, module, _ in self._pairs:
            module._parameters.clear()
        self._pairs.clear()
        self._copies.clear()
        self._parameters.clear()
        del self._model

    def _copy(self, live: nn.Module) -> nn.Module:
        if id(live) in self._copies:
            return self._copies[id(live)]
        module = self._copies[id(live)] = copy.copy(live)
        metadata, _ = get_layerwise_info(live).restore_metadata
        for name in ("_parameters", "_buffers", "_modules"):
            vars(module)[name] = dict(vars(live)[name])
        vars(module)["_modules"] |= {name: self._copy(child) for name, child in live._modules.items() if child is not None}
        # An experts' method that has a kernel already takes a second call for an update in place and leaves packed experts as they were.
        if vars(module).get("moe_kernel") is not None:
            vars(module)["moe_kernel"] = None
        before = dict(vars(module))
        vars(module)["_parameters"] = {name: self._fresh(name, value, live, module, metadata) for name, value in live._parameters.items()}
        self._pairs.append((live, module, before))
        return module

    def _fresh(self, name: str, parameter: Tensor | None, live: nn.Module, module: nn.Module, metadata: dict[str, Tensor]) -> Tensor | None:
        """An empty tensor as the loader wants it: of the shape before kernels packed it, with loaders bound to the copy."""
        if parameter is None:
            return None
        if id(parameter) not in self._parameters:
            recorded = metadata.get(name, parameter)  # vLLM records no biases, and packs none
            with torch.device(self._device):
                tensor = restore_layer_refs(materialize_meta_tensor(recorded), module)
            for key, value in vars(tensor).items():
                if isinstance(value, MethodType) and value.__self__ is live:
                    vars(tensor)[key] = value.__func__.__get__(module)
            self._parameters[id(parameter)] = tensor
        return self._parameters[id(parameter)]
