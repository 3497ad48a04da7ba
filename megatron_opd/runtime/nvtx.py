"""NVIDIA's DLProf, where it is installed: marks on every torch operation, so that its profiler can name them."""

import importlib
import importlib.util

_MODULE = "nvidia_dlprof_pytorch_nvtx"  # from NVIDIA's own index; never run here


def mark_operations() -> None:
    """Switches the marks on if the package is there; without it there is nothing to switch on."""
    if importlib.util.find_spec(_MODULE) is not None:
        importlib.import_module(_MODULE).init(enable_function_stack=True)
