import pytest
import torch
import torch.nn.functional as F

from tests.model import tiny
from tests.ranks import run_ranks

# The longest test sequence is longer than every original context and every window. Pipeline stages are uneven where layers are odd.
ORIGINAL = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": {
        "rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
        "head_dim": 12,
        "num_hidden_layers": 5,
    },
    "llama_bias": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    },
    "mistral": {"sliding_window": 9, "rope_parameters": {"rope_type": "yarn", "attention_factor": 1.3, "truncate": False, **ORIGINAL}},
    "qwen2": {"rope_parameters": {"rope_type": "yarn", **ORIGINAL}},
    "qwen2_window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    "qwen3": {"tie_word_embeddings": True, "num_hidden_layers": 5},
    "qwen3_untied": {"num_attention_heads": 4, "num_key_value_heads": 4},
}
LAYOUTS = {
    1: [{}, {"recompute": True}],
    2: [{"tensor": 2}, {"tensor": 2, "sequence_parallel": True, "recompute": True}, {"pipeline": 2}, {"data": 2}],
    4: [{"tensor": 2, "pipeline": 2, "sequence_parallel": True}, {"pipeline": 2, "data": 2, "recompute": True}, {"tensor": 2, "data": 2}],
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.write_model(root / name, name.split("_")[0], **overrides) for name, overrides in MODELS.items()}


@pytest.fixture(scope="session", params=list(LAYOUTS))
def ranks(request, folders) -> list[list[dict]]:
    """By rank, by layout: model name -> what `ranks_of.everything` finds."""
    from tests.model.ranks_of import everything

    return run_ranks(everything, request.param, folders, LAYOUTS[request.param])


@pytest.fixture(scope="session")
def transformers_says(folders) -> dict[str, dict]:
    """Logits of all batches and gradients of the mean cross-entropy by model name: each sequence on its own, in float64."""
    return {name: _logits_and_gradients(folder) for name, folder in folders.items()}


def _logits_and_gradients(folder: str) -> dict:
    model = tiny.read_model(folder).double()
    logits = torch.cat([model(sequence[None]).logits[0] for batch in tiny.BATCHES for sequence in tiny.sequences(batch)])
    F.cross_entropy(logits, torch.cat([batch.token.ids[:, 0] for batch in tiny.BATCHES])).backward()
    return {"logits": logits.detach(), "gradients": {name: parameter.grad for name, parameter in model.named_parameters()}}
