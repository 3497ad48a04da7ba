"""Checkpoints between Hugging Face and Megatron-Core. CPU only; memory for two of the largest tensors and 1 GiB; disk speed.

    python tools/convert.py hf-to-megatron FOLDER CHECKPOINT --tp 4 --pp 2 --ep 8
    python tools/convert.py megatron-to-hf CHECKPOINT FOLDER
    python tools/convert.py verify A B
    python tools/convert.py inspect A --digest

The same as `megatron-opd convert`. A conversion reads back what it wrote, compares every byte with the source and, where
memory allows, logits of transformers and Megatron-Core; only then the target appears under its name. An interrupted one
continues when it is called again. Exit code 0 only if all agree.
"""

import sys

from megatron_opd.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
