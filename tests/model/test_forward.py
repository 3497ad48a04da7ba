import pytest
import torch

from tests.model import tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines

MODELS = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, "head_dim": 12},
    "llama_bias": {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_tied": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip
LAYOUTS = {
    1: [{}],
    2: [{"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}],
    4: [{"tensor": 2, "pipeline": 2, "sequence_parallel": True}, {"pipeline": 4}],
}
# Different lengths per micro-batch: a pipeline must not take the first one's for all.
BATCHES = [tiny.micro_batch((7, 1, 12), seed=1), tiny.micro_batch((26,), seed=2), tiny.micro_batch((3, 5), seed=3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.write_model(root / name, name.split("_")[0], **overrides) for name, overrides in MODELS.items()}


@pytest.fixture(scope="module")
def wanted(folders) -> dict[str, torch.Tensor]:
    """Logits of transformers, each sequence on its own."""
    with torch.no_grad():
        models = {name: tiny.read_model(folder) for name, folder in folders.items()}
        ids = [sequence[None] for batch in BATCHES for sequence in tiny.sequences(batch)]
        return {name: torch.cat([model(sequence).logits[0] for sequence in ids]) for name, model in models.items()}


def _logits(folders: dict[str, str], layouts: list[dict]) -> list:
    from tests.model.ranks_of import logits

    return [[logits(folder, layout, BATCHES) for layout in layouts] for folder in folders.values()]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_hidden_states_times_head_are_the_logits_of_transformers_in_every_layout(world_size, folders, wanted):
    ranks = run_ranks(_logits, world_size, folders, LAYOUTS[world_size])
    for model, want in enumerate(wanted.values()):
        assert want.abs().max() > 1, "the test model is too flat to tell right from wrong"
        for layout in range(len(LAYOUTS[world_size])):
            results = [rank[model][layout] for rank in ranks if rank[model][layout] is not None]
            assert results, "no rank is on the last stage"
            for got in results:
                torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def _packing(folder: str) -> list[float]:
    from tests.model.ranks_of import logits

    batch = tiny.micro_batch((7, 1, 12), seed=1)
    alone = [tiny.micro_batch((len(ids),)) for ids in tiny.sequences(batch)]
    for one, ids in zip(alone, tiny.sequences(batch), strict=True):
        one.token_ids.copy_(ids)
    packed, recomputed = (logits(folder, {}, [batch], recompute=recompute) for recompute in (False, True))
    half = logits(folder, {}, [batch], dtype=torch.bfloat16)
    return [
        (packed - logits(folder, {}, alone)).abs().max().item(),
        (packed - recomputed).abs().max().item(),
        (packed - half).abs().max().item(),
    ]


def test_packing_and_recompute_change_nothing_and_bfloat16_little(folders):
    ((packing, recompute, half),) = run_ranks(_packing, 1, folders["qwen3"])
    assert packing < 1e-5
    assert recompute == 0
    assert 0 < half < 0.2
