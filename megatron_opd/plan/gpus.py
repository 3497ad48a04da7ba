"""Every constant that a plan is made of, each with its source. Speeds are replaced by those of a run where one is named."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What one GPU of an eight-GPU server has; bytes/s are of one direction."""

    memory_bytes: float
    flops: float  # dense bfloat16
    memory_bytes_s: float
    nvlink_bytes_s: float
    network_bytes_s: float


# NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU" (SXM; its 1979 TFLOPS are with sparsity), "H200 Tensor
# Core GPU" (SXM), "DGX B200"; NVLink halved to one direction. Network: one adapter per GPU as in NVIDIA's DGX of the same
# name, HDR 200 Gb/s or NDR 400 Gb/s.
GPUS = {
    "a100": Gpu(memory_bytes=80e9, flops=312e12, memory_bytes_s=2.039e12, nvlink_bytes_s=300e9, network_bytes_s=25e9),
    "h100": Gpu(memory_bytes=80e9, flops=989e12, memory_bytes_s=3.35e12, nvlink_bytes_s=450e9, network_bytes_s=50e9),
    "h200": Gpu(memory_bytes=141e9, flops=989e12, memory_bytes_s=4.8e12, nvlink_bytes_s=450e9, network_bytes_s=50e9),
    "b200": Gpu(memory_bytes=180e9, flops=2250e12, memory_bytes_s=8e12, nvlink_bytes_s=900e9, network_bytes_s=50e9),
}

TRAIN_SHARE = 0.40  # of `flops`; Llama 3 on up to 16,384 H100: 38 to 43 % (arXiv:2407.21783, table 4)
FORWARD_SHARE = 0.50  # of `flops`; assumed: a forward pass alone, without optimizer and gradients
DECODE_SHARE = 0.60  # of `memory_bytes_s`; assumed
LINK_SHARE = 0.70  # of a link in large collectives; assumed
DECODE_LAYER_S = 15e-6  # launches and, between GPUs, two small reductions of one layer; assumed
PAUSE_S = 0.006  # vLLM stops, swaps and starts around a weight update; measured here

GPU_RESERVE_BYTES = 4e9  # CUDA context, NCCL, library workspaces, fragmentation; assumed
CPU_RESERVE_BYTES = 0.6e9  # Python with torch and Megatron; measured here, replaced by tools/plan_check.py's own
CPU_ACTIVATION_COPIES = 2  # norms, rotation and SwiGLU are not fused there and keep their steps too; from the demo at half its batch
KERNEL_COPIES = 3  # of a chunk of float32 logits in the kernel doors: logits, probabilities, their gradient

# What a decoding step takes that does not grow with its sequences, in sequences: for runs that speeds are taken from. Of 10, 24, 48, 80 and
# 120, the one that fits the demo best, eight and 128 at a time on a CPU (tools/plan_check.py, cores shared by other jobs).
DECODE_BASE = 24
