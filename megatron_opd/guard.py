"""Stops a run that goes wrong. It knows reports, and refuses to know why; `loop.export_every` leaves something to go back to."""

from collections import deque

from megatron_opd.config import GuardConfig
from megatron_opd.errors import GuardError
from megatron_opd.types import StepReport


class Guard:
    """Watches means over a window of steps."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings
        self._lengths: deque[float] = deque(maxlen=settings.window)
        self._masses: deque[float] = deque(maxlen=settings.window)
        self._first_length: float | None = None

    def watch(self, report: StepReport, mean_length: float) -> None:
        """One step, with the mean response length in tokens.

        Raises:
            GuardError: responses have grown too long, or the student has left the cached ids.
        """
        self._lengths.append(mean_length)
        if "support_mass" in report.diagnostics:
            self._masses.append(report.diagnostics["support_mass"])
        if len(self._lengths) < self._settings.window:
            return
        length = sum(self._lengths) / len(self._lengths)
        if self._first_length is None:
            self._first_length = length
        growth = self._settings.length_growth
        if growth and length > growth * self._first_length:
            raise GuardError(
                f"step {report.version}: responses have grown from {self._first_length:.0f} to {length:.0f} tokens on average, more than "
                f"guard.length_growth={growth:g} times; lower learner.optimizer.lr or loop.max_lag, or raise the guard"
            )
        mass = sum(self._masses) / len(self._masses) if self._masses else 1.0
        if mass < self._settings.support_mass:
            raise GuardError(
                f"step {report.version}: the student gives the cached ids a mass of {mass:.2g}, less than "
                f"guard.support_mass={self._settings.support_mass:g}; cache more ids, or lower learner.optimizer.lr or loop.max_lag"
            )
