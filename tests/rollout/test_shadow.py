"""The shadow on vLLM's own modules, without an engine: live weights stay as they are until the swap, then nothing of them is left."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model

from megatron_opd.errors import WeightSyncError
from megatron_opd.rollout.shadow import Shadow
from tests.rollout.models import save_experts, save_model

pytestmark = pytest.mark.engines
CPU = torch.device("cpu")
MODELS = {"dense": save_model, "tied": lambda folder, seed: save_model(folder, seed, tied=True), "experts": save_experts}


class Loaded:
    """A model as an engine's worker loads it."""

    def __init__(self, path, dtype):
        arguments = EngineArgs(model=path, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64)
        self.path, self.config = path, arguments.create_engine_config()
        with set_current_vllm_config(self.config):
            destroy_model_parallel()  # experts want one group more
            init_distributed_environment(1, 0, f"file://{path}/store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            self.model = get_model(vllm_config=self.config)

    def outputs(self):
        """Of every module that has weights, on random inputs."""
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(self.config.model_config.dtype)
        found = []
        with torch.inference_mode(), set_current_vllm_config(self.config), set_forward_context(None, self.config):
            found.append(self.model.embed_input_ids(torch.arange(5)))
            for layer in self.model.model.layers:
                attention = layer.self_attn
                found += [layer.input_layernorm(x), attention.qkv_proj(x)[0], attention.o_proj(x)[0], attention.q_norm(x[:, :32])]
                found += [layer.post_attention_layernorm(x), layer.mlp(x.clone())]
            found += [self.model.model.norm(x), self.model.compute_logits(x)]
        return found

    def shadow(self, path, change=dict):
        """The weights of another folder, staged."""
        with set_current_vllm_config(self.config):
            shadow = Shadow(self.model, CPU)
            shadow.load(iter(change(load_file(Path(path) / "model.safetensors")).items()))
        return shadow


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, engine_environment):
    """By kind and dtype: two models of different weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU worker does, for there is none
        root = tmp_path_factory.mktemp("shadow")
        paths = {(kind, seed): save(root / f"{kind}{seed}", seed) for kind, save in MODELS.items() for seed in (0, 1)}
        yield lambda kind, dtype: [Loaded(paths[kind, seed], dtype) for seed in (0, 1)]
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("dense", "bfloat16"), ("tied", "float32"), ("experts", "float32"), ("experts", "bfloat16")]
)  # float32 is packed by oneDNN, small bfloat16 by another kernel
def test_staging_changes_no_bit_and_the_swap_changes_every_module(loaded, kind, dtype):
    first, second = loaded(kind, dtype)
    old, new = first.outputs(), second.outputs()
    assert not any(same(old, new)), "the test sees each module that keeps its weights"
    for path, before, after in ((second.path, old, new), (first.path, new, old)):
        shadow = first.shadow(path)
        assert all(same(first.outputs(), before))
        shadow.swap()
        shadow.forget()
        assert all(same(first.outputs(), after))


@pytest.mark.parametrize("kind", list(MODELS))
def test_of_weights_that_were_swapped_away_nothing_stays(loaded, kind):
    first, second = loaded(kind, "float32")
    before = []
    for path in (second.path, first.path, second.path):
        before += map(weakref.ref, first.model.parameters())
        shadow = first.shadow(path)
        shadow.swap()
        shadow.forget()
        del shadow
        gc.collect()
        assert not [ref for ref in before if ref() is not None], "loaders of the live weights hold older ones"


def test_a_parameter_that_got_no_weights_is_named(loaded):
    first, second = loaded("dense", "float32")
    old = first.outputs()

    def without(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.input_layernorm.weight"}

    with pytest.raises(WeightSyncError, match=r"left model\.layers\.1\.input_layernorm\.weight and 0 more"):
        first.shadow(second.path, without)
    assert all(same(first.outputs(), old))
