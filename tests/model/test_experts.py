"""Experts: names as files have them, logits and gradients of transformers in every layout, and through a checkpoint and back."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.convert import HuggingFaceModel, MegatronModel, hf_to_megatron, megatron_to_hf
from megatron_opd.weights.architectures import architecture
from megatron_opd.weights.mapping import hf_manifest
from tests.model import tiny
from tests.model.conftest import _logits_and_gradients
from tests.ranks import run_ranks

MODELS = {
    "mixtral": {"num_local_experts": 6, "num_hidden_layers": 3},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe_raw": {"num_hidden_layers": 5, "norm_topk_prob": False, "tie_word_embeddings": True, "num_experts_per_tok": 1},
}
LAYOUTS = {
    2: [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2, "recompute": True}, {"data": 2}, {"data": 2, "expert": 2}],
    4: [
        {"tensor": 2, "data": 2, "expert": 2, "sequence_parallel": True},
        {"pipeline": 2, "data": 2, "expert": 2, "recompute": True},
        {"data": 4, "expert": 2},
    ],
}
FROM_CHECKPOINT = {2: {"data": 2, "expert": 2}, 4: {"pipeline": 2, "data": 2, "expert": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {name: tiny.write_model(root / name, name.removesuffix("_raw"), **overrides) for name, overrides in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_manifest_names_exactly_the_tensors_of_the_file(name, folders):
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(f"{folders[name]}/model.safetensors").items()}
    assert {spec.name: spec.shape for spec in hf_manifest(tiny.read_config(folders[name]), "float32")} == stored


def by_file_names(named, experts):
    """Tensors of the modules of transformers, which hold all experts in one, under the names that files have."""
    gate, up, down = experts.projections
    for name, tensor in named.items():
        prefix, _, kind = name.rpartition(".mlp.")
        if kind == "experts.gate_up_proj":
            for number, (first, second) in enumerate(zip(*tensor.chunk(2, dim=1))):
                yield f"{prefix}.{experts.block}.experts.{number}.{gate}.weight", first
                yield f"{prefix}.{experts.block}.experts.{number}.{up}.weight", second
        elif kind == "experts.down_proj":
            for number, one in enumerate(tensor):
                yield f"{prefix}.{experts.block}.experts.{number}.{down}.weight", one
        elif kind == "gate.weight":
            yield f"{prefix}.{experts.block}.gate.weight", tensor
        else:
            yield name, tensor


def _everything(folders, layouts, checkpoints, sizes):
    from megatron_opd.model.parallel import ParallelConfig, initialize
    from tests.model.ranks_of import Loaded, everything

    parallel = ParallelConfig(**sizes)
    initialize(parallel, device="cpu", seed=0)
    loaded = {name: Loaded(folders[name], parallel, checkpoint=path).logits(tiny.BATCHES) for name, path in checkpoints.items()}
    return [everything(folders, layouts), loaded]


@pytest.fixture(scope="module")
def checkpoints(folders, tmp_path_factory):
    """Each model converted, and found to come back byte for byte."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, folder in folders.items():
        hf_to_megatron(HuggingFaceModel(root.joinpath(folder)), root / name, tensor=2, pipeline=2, expert=2, logits=False)
        proof = megatron_to_hf(MegatronModel(root / name), root / f"{name}-back", logits=False)
        first, last = load_file(f"{folder}/model.safetensors"), load_file(root / f"{name}-back" / "model.safetensors")
        assert proof.endswith("equal byte for byte") and first.keys() == last.keys()
        assert all(torch.equal(first[key], last[key]) for key in first)
    return {name: str(root / name) for name in folders}


@pytest.mark.engines
@pytest.mark.parametrize("world", LAYOUTS)
def test_weights_logits_and_gradients_are_those_of_transformers_in_every_layout_and_from_a_checkpoint(world, folders, checkpoints):
    ranks = run_ranks(_everything, world, folders, LAYOUTS[world], checkpoints, FROM_CHECKPOINT[world], timeout_s=300)
    for name, folder in folders.items():
        says, stored = _logits_and_gradients(folder), load_file(f"{folder}/model.safetensors")
        assert says["logits"].abs().max() > 1
        want = dict(by_file_names(says["gradients"], architecture(tiny.read_config(folder)).experts))
        for layout in range(len(LAYOUTS[world])):
            found = [rank[0][layout][name] for rank in ranks]
            assert all(torch.equal(tensor, stored[key]) for key, tensor in found[0]["weights"].items())
            assert found[0]["weights"].keys() == stored.keys()
            parts = [(key, tensor) for one in found for key, tensor in one["part"].items()]
            assert sorted(key for key, _ in parts) == sorted(stored) and all(torch.equal(tensor, stored[key]) for key, tensor in parts)
            for logits in (one["logits"] for one in found if one["logits"] is not None):
                torch.testing.assert_close(logits.double(), says["logits"], atol=1e-4, rtol=0)
            assert found[0]["gradients"].keys() == want.keys()
            for key, gradient in want.items():
                error = (found[0]["gradients"][key] - gradient).norm()
                assert error <= 1e-5 * gradient.norm() + 1e-9, f"{name}, layout {layout}: gradient of {key} is off by {error:.1e}"
        torch.testing.assert_close(ranks[-1][1][name].double(), says["logits"], atol=1e-4, rtol=0)
