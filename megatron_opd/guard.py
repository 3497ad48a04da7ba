"""Stops a run that goes wrong. It knows reports, and refuses to know why; `loop.export_every` leaves something to go back to."""

from collections import deque

from megatron_opd.config import GuardConfig
from megatron_opd.errors import GuardError
from megatron_opd.types import GuardState, StepReport


class Guard:
    """Watches means over a window of steps."""

    def __init__(self, settings: GuardConfig, before: GuardState | None = None) -> None:
        """`before` is what an earlier process of the same run remembered."""
        before = before or GuardState()
        self._settings = settings
        self._lengths = deque(before.lengths, maxlen=settings.window)
        self._masses = deque(before.masses, maxlen=settings.window)
        self._first_length = before.first_length
        self._skipped = 0

    @property
    def state(self) -> GuardState:
        """What it remembers. Skipped steps are not among it: a resumed run is given another chance."""
        return GuardState(lengths=tuple(self._lengths), masses=tuple(self._masses), first_length=self._first_length)

    def watch(self, report: StepReport, mean_length: float | None) -> None:
        """One step, with the mean response length in tokens; None where the responses are given ones, and only skipped steps count.

        Raises:
            GuardError: responses have grown too long, the student has left the cached ids, or too many steps in a row were skipped.
        """
        self._skipped = self._skipped + 1 if report.skipped else 0
        if self._settings.skipped_steps and self._skipped >= self._settings.skipped_steps:
            raise GuardError(
                f"step {report.version}: {self._skipped} steps in a row had a loss or gradient that is not finite and were skipped "
                f"(guard.skipped_steps={self._settings.skipped_steps}); lower learner.optimizer.lr or check the teacher"
            )
        if report.skipped or mean_length is None:
            return
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
