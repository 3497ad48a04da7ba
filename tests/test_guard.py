import pytest

from megatron_opd.config import GuardConfig
from megatron_opd.errors import GuardError
from megatron_opd.guard import Guard
from megatron_opd.types import StepReport


def report(version, skipped=False, **diagnostics):
    return StepReport(
        version=version,
        loss=0.0,
        diagnostics=diagnostics,
        kl_by_position={},
        grad_norm=0.0,
        learning_rate=0.0,
        sequences=1,
        tokens=1,
        lags={},
        seconds={},
        skipped=skipped,
    )


def stopped_at(settings, lengths, masses=None):
    """The step at which the guard stops a run of such mean lengths and masses, and why; (None, "") if it never does."""
    guard = Guard(settings)
    for version, length in enumerate(lengths, 1):
        diagnostics = {} if masses is None else {"support_mass": masses[version - 1]}
        try:
            guard.watch(report(version, **diagnostics), length)
        except GuardError as error:
            return version, str(error)
    return None, ""


def test_lengths_that_explode_stop_the_run_once_a_whole_window_is_long():
    step, why = stopped_at(GuardConfig(window=3, length_growth=2.0), [10, 10, 10, 19, 21, 19, 21, 30, 30])
    assert step == 7 and "from 10 to 20 tokens" in why and "guard.length_growth=2" in why


def test_mass_that_leaves_the_cached_ids_stops_the_run():
    step, why = stopped_at(GuardConfig(window=2, support_mass=0.5), [5] * 5, [0.9, 0.6, 0.5, 0.4, 0.1])
    assert step == 4 and "mass of 0.45" in why


@pytest.mark.parametrize("lengths, masses", [([3, 4, 5, 6, 5, 4, 3], [0.9] * 7), ([10] * 7, None), ([1, 900], [0.0, 0.0])])
def test_a_sound_run_goes_on_and_so_does_one_shorter_than_the_window(lengths, masses):
    assert stopped_at(GuardConfig(window=3), lengths, masses) == (None, "")


def test_a_guard_of_zero_is_off():
    off = GuardConfig(window=1, length_growth=0.0, support_mass=0.0)
    assert stopped_at(off, [1, 1000, 100_000], [0.0] * 3) == (None, "")


def test_steps_that_are_skipped_in_a_row_stop_the_run_and_count_for_nothing_else():
    guard = Guard(GuardConfig(window=1, skipped_steps=3, support_mass=0.5))
    for version, skipped in enumerate([True, True, False, True, True], 1):
        guard.watch(report(version, skipped, support_mass=float("nan") if skipped else 0.9), None if version == 5 else 10.0)
    with pytest.raises(GuardError, match=r"step 6: 3 steps in a row .*guard\.skipped_steps=3"):
        guard.watch(report(6, True), 10.0)


def test_a_guard_goes_on_where_an_earlier_one_stood():
    settings, lengths = GuardConfig(window=3, length_growth=2.0), [10, 10, 10, 19, 21, 19, 21]
    first = Guard(settings)
    for version, length in enumerate(lengths[:5], 1):
        first.watch(report(version), length)
    second = Guard(settings, first.state)
    second.watch(report(6), lengths[5])
    with pytest.raises(GuardError, match="from 10 to 20 tokens"):
        second.watch(report(7), lengths[6])
