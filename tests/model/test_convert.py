import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.weights.mapping import hf_manifest
from tests.model import tiny

pytestmark = pytest.mark.engines


def test_weights_come_back_byte_for_byte_in_manifest_order_on_rank_0_only(ranks, folders):
    first, *others = ranks
    assert not any(result["weights"] for layouts in others for models in layouts for result in models.values())
    for name, folder in folders.items():
        stored = load_file(f"{folder}/model.safetensors")
        manifest = hf_manifest(tiny.read_config(folder), "float32")
        for models in first:
            weights, half = models[name]["weights"], models[name]["half"]
            assert [(spec.name, spec.shape) for spec in manifest] == [(key, tuple(tensor.shape)) for key, tensor in weights.items()]
            assert weights.keys() == half.keys() == stored.keys()
            assert all(torch.equal(tensor, stored[key]) for key, tensor in weights.items())
            assert all(torch.equal(tensor, stored[key].bfloat16()) for key, tensor in half.items())


def test_the_parts_of_all_stages_are_the_model(ranks, folders):
    for name, folder in folders.items():
        stored = load_file(f"{folder}/model.safetensors")
        for layout in range(len(ranks[0])):
            parts = [(key, tensor) for rank in ranks for key, tensor in rank[layout][name]["part"].items()]
            assert sorted(key for key, _ in parts) == sorted(stored)
            assert all(torch.equal(tensor, stored[key]) for key, tensor in parts)
