import pytest
import torch
import torch.nn.functional as F

from tests.model import tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines

MODELS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}
LAYOUTS = {
    1: [{}],
    2: [{"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"data": 2}],
    4: [{"tensor": 2, "pipeline": 2, "sequence_parallel": True}, {"pipeline": 2, "data": 2}],
}
BATCHES = [tiny.micro_batch((7, 1, 12), seed=1), tiny.micro_batch((26,), seed=2), tiny.micro_batch((3, 5), seed=3), tiny.micro_batch((8,))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.write_model(root / name, name, **overrides) for name, overrides in MODELS.items()}


@pytest.fixture(scope="module")
def wanted(folders) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of transformers, in float64."""
    gradients = {}
    for name, folder in folders.items():
        model = tiny.read_model(folder).double()
        for batch in BATCHES:
            logits = torch.cat([model(sequence[None]).logits[0] for sequence in tiny.sequences(batch)])
            F.cross_entropy(logits, batch.token.ids[:, 0], reduction="sum").backward()
        tokens = sum(len(batch.token_ids) for batch in BATCHES)
        gradients[name] = {name: parameter.grad / tokens for name, parameter in model.named_parameters()}
    return gradients


def _gradients(folders: dict[str, str], layouts: list[dict], recompute: bool) -> list:
    from tests.model.ranks_of import gradients

    return [[gradients(folder, layout, BATCHES, recompute=recompute) for layout in layouts] for folder in folders.values()]


@pytest.mark.parametrize(("world_size", "recompute"), [(1, False), (1, True), (2, False), (4, True)])
def test_gradients_are_those_of_transformers_in_every_layout(world_size, recompute, folders, wanted):
    layouts = LAYOUTS[world_size]
    first, *others = run_ranks(_gradients, world_size, folders, layouts, recompute)
    assert not any(tensors for rank in others for model in rank for tensors in model), "only rank 0 gets exported tensors"
    for got_by_layout, want in zip(first, wanted.values(), strict=True):
        for layout, got in zip(layouts, got_by_layout, strict=True):
            assert got.keys() == want.keys()
            for name, gradient in want.items():
                error = (got[name] - gradient).norm() / gradient.norm()
                assert error < 1e-5, f"{layout}: gradient of {name} is off by {error:.1e}"
