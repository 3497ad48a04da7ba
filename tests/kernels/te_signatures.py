"""What TransformerEngine's own source says of everything that kernels/te.py calls, and a stand-in that holds calls to it.

    python tests/kernels/te_signatures.py FOLDER ...     # FOLDER: an unpacked wheel of transformer-engine; prints SIGNATURES anew

The wheel `transformer-engine` (without suffix) is plain Python; `pip download --no-deps transformer-engine==2.11.0` fetches it.
"""

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

WHERE = {  # name here -> file below transformer_engine/pytorch, class, function
    "general_gemm": ("cpp_extensions/gemm.py", None, "general_gemm"),
    "get_workspace": ("module/base.py", None, "get_workspace"),
    "is_fp8_available": ("quantization.py", None, "is_fp8_available"),
    "is_mxfp8_available": ("quantization.py", None, "is_mxfp8_available"),
    "is_fp8_block_scaling_available": ("quantization.py", None, "is_fp8_block_scaling_available"),
    "Float8Quantizer": ("tensor/float8_tensor.py", "Float8Quantizer", "__init__"),
    "Float8CurrentScalingQuantizer": ("tensor/float8_tensor.py", "Float8CurrentScalingQuantizer", "__init__"),
    "Float8BlockQuantizer": ("tensor/float8_blockwise_tensor.py", "Float8BlockQuantizer", "__init__"),
    "MXFP8Quantizer": ("tensor/mxfp8_tensor.py", "MXFP8Quantizer", "__init__"),
    "Quantizer.__call__": (("quantized_tensor.py", "tensor/quantized_tensor.py"), "Quantizer", "__call__"),
    "Float8Tensor.dequantize": ("tensor/float8_tensor.py", "Float8Tensor", "dequantize"),
    "Float8BlockwiseQTensor.dequantize": ("tensor/float8_blockwise_tensor.py", "Float8BlockwiseQTensor", "dequantize"),
    "MXFP8Tensor.dequantize": ("tensor/mxfp8_tensor.py", "MXFP8Tensor", "dequantize"),
}
EXPORTED = {  # of transformer_engine.pytorch
    "Float8Quantizer", "Float8CurrentScalingQuantizer", "Float8BlockQuantizer", "MXFP8Quantizer", "QuantizedTensor",
    "is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available",
}  # fmt: skip


def arguments(function: ast.FunctionDef) -> str:
    """Names, kinds and which have defaults, as the source of a lambda would have them."""
    given = function.args
    for one in (*given.args, *given.posonlyargs, *given.kwonlyargs):
        one.annotation = None
    given.defaults = [ast.Constant(0) for _ in given.defaults]
    given.kw_defaults = [default and ast.Constant(0) for default in given.kw_defaults]
    return ast.unparse(given)


def record(folder: Path) -> tuple[str, dict[str, str]]:
    """Version and signatures of an unpacked wheel."""
    (version,) = [path.name.split("-")[1].removesuffix(".dist") for path in folder.glob("transformer_engine-*.dist-info")]
    room = folder / "transformer_engine" / "pytorch"
    exported = {
        alias.name
        for node in ast.walk(ast.parse((room / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert exported >= EXPORTED, f"{version} does not export {EXPORTED - exported}"
    found = {}
    for name, (files, owner, function) in WHERE.items():
        paths = [room / file for file in ([files] if isinstance(files, str) else files)]
        body = ast.parse(next(path for path in paths if path.exists()).read_text()).body
        if owner:
            body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner).body
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                found[name] = arguments(node)
    return version, found


SIGNATURES: dict[str, dict[str, str]] = {
    "2.9.0": {
        "general_gemm": "A, B, workspace, out_dtype=0, quantization_params=0, gelu=0, gelu_in=0, alpha=0, beta=0, "
        "accumulate=0, layout=0, out=0, bias=0, use_split_accumulator=0, grad=0, ub=0, ub_type=0, "
        "extra_output=0, bulk_overlap=0",
        "get_workspace": "",
        "is_fp8_available": "return_reason=0",
        "is_mxfp8_available": "return_reason=0",
        "is_fp8_block_scaling_available": "return_reason=0",
        "Float8Quantizer": "self, scale, amax, fp8_dtype, *, rowwise=0, columnwise=0",
        "Float8CurrentScalingQuantizer": "self, fp8_dtype, device, *, rowwise=0, columnwise=0, use_existing_amax=0, "
        "with_amax_reduction=0, amax_reduction_group=0, force_pow_2_scales=0, amax_epsilon=0",
        "Float8BlockQuantizer": "self, fp8_dtype, *, rowwise, columnwise, amax_epsilon=0, force_pow_2_scales=0, "
        "block_scaling_dim=0, all_gather_usage=0",
        "MXFP8Quantizer": "self, fp8_dtype, *, rowwise=0, columnwise=0",
        "Quantizer.__call__": "self, tensor",
        "Float8Tensor.dequantize": "self, *, dtype=0",
        "Float8BlockwiseQTensor.dequantize": "self, *, dtype=0",
        "MXFP8Tensor.dequantize": "self, *, dtype=0",
    },
    "2.10.0": {
        "general_gemm": "A, B, out_dtype=0, quantization_params=0, gelu=0, gelu_in=0, alpha=0, beta=0, accumulate=0, "
        "layout=0, out=0, bias=0, use_split_accumulator=0, grad=0, ub=0, ub_type=0, extra_output=0, "
        "bulk_overlap=0",
        "is_fp8_available": "return_reason=0",
        "is_mxfp8_available": "return_reason=0",
        "is_fp8_block_scaling_available": "return_reason=0",
        "Float8Quantizer": "self, scale, amax, fp8_dtype, *, rowwise=0, columnwise=0",
        "Float8CurrentScalingQuantizer": "self, fp8_dtype, device, *, rowwise=0, columnwise=0, use_existing_amax=0, "
        "with_amax_reduction=0, amax_reduction_group=0, force_pow_2_scales=0, "
        "amax_epsilon=0, scale=0, amax=0",
        "Float8BlockQuantizer": "self, fp8_dtype, *, rowwise, columnwise, amax_epsilon=0, force_pow_2_scales=0, "
        "block_scaling_dim=0, all_gather_usage=0",
        "MXFP8Quantizer": "self, fp8_dtype, *, rowwise=0, columnwise=0",
        "Quantizer.__call__": "self, tensor",
        "Float8Tensor.dequantize": "self, *, dtype=0",
        "Float8BlockwiseQTensor.dequantize": "self, *, dtype=0",
        "MXFP8Tensor.dequantize": "self, *, dtype=0",
    },
    "2.11.0": {
        "general_gemm": "A, B, out_dtype=0, quantization_params=0, gelu=0, gelu_in=0, alpha=0, beta=0, accumulate=0, "
        "layout=0, out=0, bias=0, use_split_accumulator=0, grad=0, ub=0, ub_type=0, extra_output=0, "
        "bulk_overlap=0",
        "is_fp8_available": "return_reason=0",
        "is_mxfp8_available": "return_reason=0",
        "is_fp8_block_scaling_available": "return_reason=0",
        "Float8Quantizer": "self, scale, amax, fp8_dtype, *, rowwise=0, columnwise=0",
        "Float8CurrentScalingQuantizer": "self, fp8_dtype, device, *, rowwise=0, columnwise=0, use_existing_amax=0, "
        "with_amax_reduction=0, amax_reduction_group=0, force_pow_2_scales=0, "
        "amax_epsilon=0, scale=0, amax=0",
        "Float8BlockQuantizer": "self, fp8_dtype, *, rowwise, columnwise, amax_epsilon=0, force_pow_2_scales=0, "
        "block_scaling_dim=0, all_gather_usage=0",
        "MXFP8Quantizer": "self, fp8_dtype, *, rowwise=0, columnwise=0",
        "Quantizer.__call__": "self, tensor",
        "Float8Tensor.dequantize": "self, *, dtype=0",
        "Float8BlockwiseQTensor.dequantize": "self, *, dtype=0",
        "MXFP8Tensor.dequantize": "self, *, dtype=0",
    },
}


class Calls:
    """Binds calls to the signatures of one version, and counts them."""

    def __init__(self, version: str) -> None:
        self.version, self.seen = version, set()

    def bound(self, name: str, *args, **kwargs) -> dict:
        """The arguments by name. TypeError where that version would raise it."""
        signature = inspect.signature(eval(f"lambda {SIGNATURES[self.version][name]}: None"))
        self.seen.add(name)
        return signature.bind(*args, **kwargs).arguments


def stand_in(version: str, emulation: type) -> tuple[dict[str, ModuleType], Calls]:
    """Modules for `sys.modules` whose functions take what that version takes and do what `emulation` does on a CPU."""
    from megatron_opd.kernels.fp8 import E4M3
    from megatron_opd.kernels.fp8_emulation import blocks, current_scale, mx_blocks, per_tensor

    calls = Calls(version)
    dtypes = SimpleNamespace(kFloat8E4M3=E4M3)

    class Quantized:
        def __init__(self, kind, rowwise, columnwise):
            self.kind, self.rowwise, self.columnwise = kind, rowwise, columnwise

        def dequantize(self, *args, **kwargs):
            assert calls.bound(f"{self.kind}.dequantize", None, *args, **kwargs)["dtype"] == torch.float32
            return self.rowwise

    def quantizer(name, kind, both_ways):
        def build(*args, **kwargs):
            given = calls.bound(name, None, *args, **kwargs)
            assert given["fp8_dtype"] == E4M3

            def quantize(*args):
                x = calls.bound("Quantizer.__call__", None, *args)["tensor"]
                assert x.is_contiguous()
                rowwise, columnwise = both_ways(x, given)
                return Quantized(kind, rowwise if given["rowwise"] else None, columnwise if given["columnwise"] else None)

            return quantize

        return build

    def current(x, given):
        assert given["force_pow_2_scales"]
        return [per_tensor(x, current_scale(x)).values()] * 2

    def delayed(x, given):
        given["amax"].copy_(x.abs().amax().float())
        return [per_tensor(x, given["scale"]).values()] * 2

    def blockwise(x, given):
        if given["block_scaling_dim"] == 2:
            return [blocks(x, square=True).values()] * 2
        return blocks(x).values(), blocks(x.t()).values().t()

    def mx(x, given):
        return mx_blocks(x).values(), mx_blocks(x.t()).values().t()

    def general_gemm(*args, **kwargs):
        given = calls.bound("general_gemm", *args, **kwargs)
        assert given["use_split_accumulator"] and given["out_dtype"] == torch.float32
        assert given["out"] is None or given["out"].is_contiguous()
        found = emulation("current").product(given["A"], given["B"], given["layout"], out=given["out"], add=given["accumulate"])
        return found, None, None, None

    def available(name):
        return lambda *args, **kwargs: (calls.bound(name, *args, **kwargs)["return_reason"], "")

    def get_workspace(*args):
        calls.bound("get_workspace", *args)
        return torch.empty(0)

    te = ModuleType("transformer_engine.pytorch")
    te.QuantizedTensor = Quantized
    te.Float8Quantizer = quantizer("Float8Quantizer", "Float8Tensor", delayed)
    te.Float8CurrentScalingQuantizer = quantizer("Float8CurrentScalingQuantizer", "Float8Tensor", current)
    te.Float8BlockQuantizer = quantizer("Float8BlockQuantizer", "Float8BlockwiseQTensor", blockwise)
    te.MXFP8Quantizer = quantizer("MXFP8Quantizer", "MXFP8Tensor", mx)
    for name in ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available"):
        setattr(te, name, available(name))
    assert EXPORTED <= set(vars(te)), "the stand-in lacks what is recorded"
    modules = {name: ModuleType(name) for name in ("transformer_engine", "transformer_engine_torch", "transformer_engine.pytorch.module")}
    modules["transformer_engine.pytorch"] = modules["transformer_engine"].pytorch = te
    modules["transformer_engine_torch"].DType = dtypes
    modules["transformer_engine.pytorch.cpp_extensions"] = SimpleNamespace(general_gemm=general_gemm)
    modules["transformer_engine.pytorch.module.base"] = SimpleNamespace(get_workspace=get_workspace)
    return modules, calls


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(record(Path(folder)))
