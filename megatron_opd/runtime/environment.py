"""What a process that runs a vLLM engine needs around it: variables before it starts, packages that must not be there."""

import fcntl
import importlib.util
import os
import socket
import struct

import torch

from megatron_opd.errors import ConfigError

_SIOCGIFADDR = 0x8915  # Linux: IPv4 address of an interface
_BREAK_CPU_BUILDS = ("torchvision", "torchaudio", "torchcodec")


def environment(device: str, host: str = "127.0.0.1") -> dict[str, str]:
    """Variables that a role's process must be started with on a machine that is reached at `host`.

    Setting them inside the process is too late for some: torch reads those of OpenMP when it is imported.
    """
    interface = interface_of(host)
    variables = {
        "VLLM_HOST_IP": host,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", interface),  # else gloo listens wherever the machine's own name leads
        "HF_HUB_OFFLINE": "1",  # models are folders; nothing is fetched while a run is on
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",  # not ERROR: weights that a reload missed are only warned of
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less per engine: LLM in its own, AsyncLLM in two
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # logits processors, and so head and draws, exist in the V1 model runner only
        # A forked engine need not import vLLM again, 8 s of a core. Roles start it before they open sockets or threads of their own.
        "VLLM_WORKER_MULTIPROC_METHOD": "fork" if device == "cpu" else "spawn",
    }
    if device == "cpu":
        variables |= {
            "OMP_NUM_THREADS": os.environ.get(
                "OMP_NUM_THREADS", "1"
            ),  # more threads spin at barriers: ten times slower beside any other process
            "OMP_WAIT_POLICY": "PASSIVE",  # and where someone sets more, they sleep instead
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else tensor-parallel workers want a NUMA node each, and engines share core 0
            "TORCHDYNAMO_DISABLE": "1",  # the first log-probabilities would wait 3 to 22 s for a compiler
        }
    else:
        variables |= {
            "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", interface),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's tensor parallelism overlaps only when kernels are queued in order
        }
    return variables


def interface_of(host: str) -> str:
    """The network interface that owns an address.

    Raises:
        ConfigError: none of this machine does.
    """
    try:
        wanted = socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(f"run.host={host} is not known: {error}; name an address of this machine, or 127.0.0.1") from error
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == wanted:
                return name
    raise ConfigError(f"run.host={host} is no address of this machine; name one that is, or 127.0.0.1")


def check_packages() -> None:
    """Raises ConfigError if packages are installed whose binaries keep vLLM from starting on a CPU build of torch."""
    found = [name for name in _BREAK_CPU_BUILDS if torch.version.cuda is None and importlib.util.find_spec(name)]
    if found:
        raise ConfigError(
            f"{', '.join(found)} cannot be loaded by this CPU build of torch and stop vLLM; run: pip uninstall -y {' '.join(found)}"
        )
