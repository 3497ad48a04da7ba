import pytest
import torch

from tests.model import tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines


def _ordinary_torch() -> list[bool]:
    from megatron_opd.runtime import megatron_cpu

    for _ in range(2):
        megatron_cpu.install()
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(2).cuda()
    x = torch.randn(3, requires_grad=True)
    compiled = torch.jit.script(_scripted)
    return [
        x.type() == "torch.FloatTensor",
        x.to(torch.float64).dtype == torch.float64,
        torch.cuda.is_available(),
        torch.equal(compiled(x), _scripted(x)),
        len(torch.overrides._get_current_function_mode_stack()) == 1,
    ]


def _scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3) + x * 2


def test_callers_other_than_megatron_keep_the_torch_they_know():
    assert run_ranks(_ordinary_torch, 1) == [[True, True, False, True, True]]


def _two_steps(folder: str, layout: dict, dtype: str) -> list:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_opd.model.parallel import ParallelConfig, initialize
    from tests.model.ranks_of import Loaded

    parallel = ParallelConfig(**layout)
    initialize(parallel, device="cpu", seed=1)
    loaded = Loaded(folder, parallel, dtype=getattr(torch, dtype), use_distributed_optimizer=True)
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=1.0, bf16=dtype == "bfloat16", use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [loaded.model])
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        loaded.backward(tiny.BATCHES)
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    return [norms, loaded.export()]


def _layouts(folder: str, layouts: list[dict]) -> list:
    return [_two_steps(folder, layout, dtype) for layout in layouts for dtype in ("float32", "bfloat16")]


def test_the_distributed_optimizer_takes_the_same_steps_in_every_layout(tmp_path):
    folder = tiny.write_model(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    ((want, want_half),) = run_ranks(_layouts, 1, folder, [{}])
    layouts = [{"data": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}]
    results = run_ranks(_layouts, 2, folder, layouts)[0]
    for exact, half in zip(results[::2], results[1::2], strict=True):
        assert exact[0] == pytest.approx(want[0], rel=1e-5)
        assert half[0] == pytest.approx(want_half[0], rel=2e-2)
        for name, tensor in want[1].items():
            # Adam divides by the gradient's size: where that is nearly zero, rounding decides the sign of a step.
            assert (exact[1][name] - tensor).norm() < 1e-3 * tensor.norm(), name
    moved = tiny.read_model(folder).state_dict()
    assert all((tensor - moved[name]).abs().max() > 1e-3 for name, tensor in want[1].items())


def _three_steps(folder: str) -> list[list[float]]:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_opd.model.parallel import ParallelConfig, initialize
    from tests.model.ranks_of import Loaded

    parallel = ParallelConfig(data=2)
    initialize(parallel, device="cpu", seed=1)
    norms: list[list[float]] = []
    for overlap in (False, True):
        # Small buckets, so that the head's weight lies in one that nothing before it gathers.
        settings = {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": overlap,
            "overlap_param_gather": overlap,
            "bucket_size": 20_000,
        }
        loaded = Loaded(folder, parallel, **settings)
        loaded.model.config.no_sync_func = loaded.model.no_sync
        optimizer_settings = OptimizerConfig(lr=1e-2, use_distributed_optimizer=True, overlap_param_gather=overlap)
        optimizer = get_megatron_optimizer(optimizer_settings, [loaded.model])
        norms.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loaded.backward(tiny.BATCHES)
            norms[-1].append(float(optimizer.step()[1]))
    return norms


def test_weights_gathered_while_computing_arrive_before_the_head_is_used(tmp_path):
    folder = tiny.write_model(tmp_path / "model", "qwen3")
    waited, overlapped = run_ranks(_three_steps, 2, folder)[0]
    assert overlapped == pytest.approx(waited, rel=1e-5)
