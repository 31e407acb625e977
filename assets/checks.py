"""Asset checks, generated from the table of alarms (`alignment.alarms`): WARN, or a blocking ERROR where going on is pointless.

An asset takes its specs from `alarm_specs`; `assets.stage` decides them from the handle and returns the results with the
materialization, also where the artifact is reused. Leakage is apart: it compares several assets.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from alignment.alarms import ALARMS, Alarm, AlarmConfig, sound, watches
from alignment.handles import Handle, PolicyReport, PreferenceDataset, PromptSet, SftDataset
from alignment.leakage import leakage
from assets.settings import recipe_config
from resources.artifacts import ArtifactStore
from resources.tracking import flatten

BOUNDS = recipe_config("alarms", AlarmConfig)
SEVERITY = {"warn": dg.AssetCheckSeverity.WARN, "error": dg.AssetCheckSeverity.ERROR}
SPLIT_DATA: dict[str, type[Handle]] = {
    "sft_dataset": SftDataset,
    "human_preferences": PreferenceDataset,
    "prompts": PromptSet,
}


def alarm_specs(asset: str) -> list[dg.AssetCheckSpec]:
    """The checks of an asset (`aligned_policy/dpo`), as `@dg.asset(check_specs=...)` wants them.

    The asset's function then has no return annotation: Dagster reads one as the type of one of its outputs, value and checks.
    """
    key = dg.AssetKey(asset.split("/"))
    return [
        dg.AssetCheckSpec(w.name, asset=key, blocking=w.severity == "error", description=w.description) for w in watches(asset)
    ]


def sound_alarms(handle: Handle, settings: Mapping[str, Any]) -> list[Alarm]:
    """What the alarms say of an artifact. `settings` are those that it was made with."""
    metrics = {**flatten(settings), **handle.metrics}
    if isinstance(handle, PolicyReport):
        metrics |= {f"policy/{name}": value for name, value in handle.policy.metrics.items()}
    return [sound(watch, metrics, BOUNDS) for watch in watches(handle.asset)]


def blocking_alarms(store: ArtifactStore, report: PolicyReport) -> dict[str, str]:
    """The blocking alarms that fire for what a report's policy was made of or was measured with, as `asset: alarm` -> why.

    Dagster holds back what follows a failed blocking check in that run alone; in the next, the policy could be measured and
    promoted all the same. Only alarms that metrics alone decide: whoever lowers a bound of the stage's own settings, for one run
    perhaps, wants to go on. An input that is no longer in the store is passed over.
    """
    made_of: dict[tuple[str, str], Handle] = {}
    todo: list[Handle] = [report, report.policy]
    while todo:
        handle = todo.pop()
        if (handle.asset, handle.fingerprint) not in made_of and (record := store.record(handle.asset, handle.fingerprint)):
            made_of[handle.asset, handle.fingerprint] = handle
            todo += filter(None, (store.find(name, digest) for name, digest in record.inputs.items()))
    fired = {}
    for handle in made_of.values():
        alarms = [alarm for alarm in sound_alarms(handle, {}) if alarm.severity == "error" and not ALARMS[alarm.name].settings]
        fired |= {f"{handle.asset}: {alarm.name}": alarm.reason for alarm in alarms if alarm.fired}
    data = {handle.asset: store.path(handle) for handle in made_of.values() if handle.asset in SPLIT_DATA}
    if set(data) == set(SPLIT_DATA):
        alarm = sound(ALARMS["nothing_leaks"], leakage(**data)[0], BOUNDS)
        if alarm.fired:
            fired[f"prompts: {alarm.name}"] = alarm.reason
    return fired


def check_result(alarm: Alarm, metadata: Mapping[str, dg.MetadataValue] | None = None) -> dg.AssetCheckResult:
    """An alarm as Dagster shows it."""
    return dg.AssetCheckResult(
        check_name=alarm.name,
        passed=not alarm.fired,
        severity=SEVERITY[alarm.severity],
        description=alarm.reason,
        metadata={"failure": ALARMS[alarm.name].failure, **(metadata or {})},
    )


@dg.asset_check(
    asset="prompts",
    additional_deps=["sft_dataset", "human_preferences"],
    blocking=True,
    description=ALARMS["nothing_leaks"].description,
)
def nothing_leaks(context: dg.AssetCheckExecutionContext, store: ArtifactStore) -> dg.AssetCheckResult:
    """Compare what the three data sets hold out with what they train on."""
    found = {name: _recorded(context.instance, store, name) for name in SPLIT_DATA}
    missing = [name for name, handle in found.items() if handle is None]
    if missing:
        return dg.AssetCheckResult(
            passed=True,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"nothing to compare with yet: {', '.join(missing)} not materialized; the next whole run compares",
        )
    counts, leaks = leakage(**{name: store.path(handle) for name, handle in found.items()})
    alarm = sound(ALARMS["nothing_leaks"], counts, BOUNDS)
    if alarm.fired:
        context.log.warning(f"alarm: prompts: {alarm.name}: {alarm.reason}")
    return check_result(alarm, {"leaked": dg.MetadataValue.json(leaks[:20])})


def _recorded(instance: dg.DagsterInstance, store: ArtifactStore, name: str) -> Handle | None:
    """The artifact that Dagster records as an asset's current one."""
    event = instance.get_latest_materialization_event(dg.AssetKey(name))
    if event is None or event.asset_materialization is None:
        return None
    return store.find(name, event.asset_materialization.metadata["fingerprint"].value)
