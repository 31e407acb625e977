"""Tests that are one run each: it is made to fail in the way that an alarm watches for, or it is healthy and no alarm fires.

What such a test asserts is what it is counted for, so that an alarm without a run is found (tests/alignment/test_alarm_runs.py).
"""

import functools

import pytest

from alignment.alarms import ALARMS, AlarmConfig, sound

SHOWN: set[tuple[str, str]] = set()
"""(asset, alarm) of every run in which an alarm fires."""

HEALTHY: set[str] = set()
"""Assets of which there is a run without any alarm."""


def fired(asset, metrics):
    """The alarms of an asset that fire at these metrics."""
    stages = {asset, asset.split("/")[0]}
    return {w.name for w in ALARMS.values() if stages & set(w.stages) and sound(w, metrics, AlarmConfig()).fired}


def shows(*alarms, of, among_others=False):
    """Makes a test of a function that returns a run's metrics: these alarms fire in it, or none does.

    Args:
        of: the asset that such a run would materialize; or several, and the function takes `asset`.
        among_others: a run that goes so wrong that further alarms fire may set off any.
    """
    assets = (of,) if isinstance(of, str) else of
    SHOWN.update((asset, alarm) for asset in assets for alarm in alarms)
    if not alarms:
        HEALTHY.update(assets)

    def make(run):
        @functools.wraps(run)
        def test(**given):
            metrics = run(**given)
            found = fired(given.get("asset", of), metrics)
            assert found >= set(alarms) if among_others else found == set(alarms), f"{found} at {metrics}"

        return test if isinstance(of, str) else pytest.mark.parametrize("asset", of)(test)

    return make
