"""Tiny models for the whole session, and the variables that vLLM reads when it is first imported."""

import os

from megatron_opd.runtime.environment import environment

os.environ.update(environment("cpu"))
