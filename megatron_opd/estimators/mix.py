"""Two objectives at once, added with weights. It knows neither of them."""

from dataclasses import dataclass, fields, replace

from megatron_opd.errors import ConfigError
from megatron_opd.interfaces import Estimator
from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class Mix:
    """L = first_weight L_1 + second_weight L_2. Where both report a diagnostic, it is the first one's."""

    first: Estimator
    second: Estimator
    first_weight: float = 1.0
    second_weight: float = 1.0

    def __post_init__(self) -> None:
        _ = self.needs

    @property
    def needs(self) -> Needs:
        """What either asks for.

        Raises:
            ConfigError: they ask for the same thing in different sizes, which would change what one of them estimates.
        """
        first, second = self.first.needs, self.second.needs
        if first.generation != second.generation:
            raise ConfigError("a mix of given completions and generated ones has no common tokens; mix estimators that generate")
        both = {}
        for name in (field.name for field in fields(Needs) if field.name != "generation"):
            one, other = getattr(first, name), getattr(second, name)
            if one and other and one != other:
                raise ConfigError(f"the mixed estimators need {name}={one} and {name}={other}; give both the same size")
            both[name] = one or other
        if any(part.draws and part.head != both["head"] for part in (first, second)):
            raise ConfigError("one of the mixed estimators draws from all of b, but the other's head would be left out of its draws")
        return replace(first, **both)

    def __call__(self, scores: TokenScores) -> Estimate:
        """The weighted sum of each target."""
        first, second = self.first(scores), self.second(scores)
        parts = {"first_loss": first.loss.detach(), "second_loss": second.loss.detach()}
        loss = self.first_weight * first.loss + self.second_weight * second.loss
        return Estimate(loss=loss, diagnostics={**second.diagnostics, **first.diagnostics, **parts})
