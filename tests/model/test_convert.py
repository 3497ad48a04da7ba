import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.weights.mapping import hf_manifest
from tests.model import tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines

MODELS = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {}}
LAYOUTS = {
    2: [{"tensor": 2}, {"pipeline": 2}, {"data": 2}],
    4: [{"tensor": 2, "pipeline": 2, "sequence_parallel": True}, {"tensor": 2, "data": 2}, {"pipeline": 2, "data": 2}],
}


def _round_trip(folders: list[str], layouts: list[dict]) -> list:
    from megatron_opd.model.convert import export_hf
    from tests.model.ranks_of import loaded

    results = []
    for folder in folders:
        for layout in layouts:
            model, hf_config, parallel = loaded(folder, layout)
            exact = list(export_hf(model, hf_config, parallel, "float32"))
            half = list(export_hf(model, hf_config, parallel, "bfloat16"))
            results.append([[name for name, _ in exact], [tensor.clone() for _, tensor in exact], [tensor.dtype == torch.bfloat16 for _, tensor in half]])
    return results


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_weights_come_back_byte_for_byte_in_manifest_order(world_size, tmp_path):
    folders = [tiny.write_model(tmp_path / name, name, **overrides) for name, overrides in MODELS.items()]
    first, *others = run_ranks(_round_trip, world_size, folders, LAYOUTS[world_size])
    assert all(names == [] for rank in others for names, _, _ in rank), "only rank 0 gets tensors"
    expected = [folder for folder in folders for _ in LAYOUTS[world_size]]
    for folder, (names, tensors, halves) in zip(expected, first, strict=True):
        stored = load_file(f"{folder}/model.safetensors")
        manifest = hf_manifest(tiny.read_config(folder), "float32")
        assert names == [spec.name for spec in manifest]
        assert set(names) == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in zip(names, tensors, strict=True))
        assert [tuple(tensor.shape) for tensor in tensors] == [spec.shape for spec in manifest]
        assert all(halves)
        assert len(halves) == len(names)
