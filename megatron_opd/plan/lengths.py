"""How long prompts and responses are: what the config assumes of them."""

from dataclasses import dataclass

from megatron_opd.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of prompts and responses, in tokens."""

    prompt: float
    response: float  # mean before the cut
    spread: float  # standard deviation of the logarithm
    longest: int


def lengths_of(config: Config) -> Lengths:
    """What `plan` says, or half of what is allowed."""
    given, longest = config.plan, config.rollout.max_response_tokens
    return Lengths(
        prompt=given.prompt_tokens or config.data.max_prompt_tokens / 2,
        response=given.response_tokens or longest / 2,
        spread=given.spread,
        longest=longest,
    )
