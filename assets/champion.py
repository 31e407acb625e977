"""`champion[c]`: compares the reports that exist, applies the gate, and moves the aliases in MLflow's registry."""

import json

import dagster as dg

from alignment.handles import Champion, PolicyReport
from alignment.methods import METHODS
from alignment.promotion import CODE_VERSION, GateConfig, choose
from assets.checks import blocking_alarms
from assets.launch_config import launch_config
from assets.settings import PARTITIONS, dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

LOOK_BACK = 20  # materializations of a method's report that are looked through for one that is comparable
LaunchConfig = launch_config("champion", recipe_config("champion", GateConfig))


@dg.asset(
    partitions_def=PARTITIONS,
    deps=[dg.AssetKey(["policy_report", name]) for name in METHODS],
    **dressed("evaluation", {"mlflow"}),
)
def champion(
    context: dg.AssetExecutionContext,
    config: LaunchConfig,  # type: ignore[valid-type]
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
) -> dg.MaterializeResult[Champion]:
    """The promotion decision, rule by rule. A refused promotion is a normal end: the champion stays who it was."""
    reports = recorded_reports(context, store)

    def stage() -> Stage:
        settings = checked_config(GateConfig, config.model_dump())

        def compute(work, log) -> Outcome:
            blocking = {name: blocking_alarms(store, report) for name, report in reports.items()}
            best, verdicts = choose({name: r.metrics for name, r in reports.items()}, settings, blocking)
            promoted = best is not None and all(rule.passed for rule in verdicts[best])
            rules = {name: [rule.model_dump() for rule in verdict] for name, verdict in verdicts.items()}
            decision = {"candidate": best, "promoted": promoted, "rules": rules}
            (work.out / "decision.json").write_text(json.dumps(decision, indent=2), encoding="utf-8")
            log.say(f"{best or 'no candidate'}: {'promoted' if promoted else 'not promoted'}")
            for name, verdict in verdicts.items():
                for rule in verdict:
                    log.say(f"{name}: {'passes' if rule.passed else 'FAILS'} {rule.name}: {rule.reason}")
            return Outcome(
                metrics={"promoted": float(promoted), "candidates": len(reports)},
                facts=decision,
                tables={"decision": [{"method": n, **rule} for n, verdict in rules.items() for rule in verdict]},
                handle={"method": best, "promoted": promoted, "policy": reports[best].policy if best else None},
            )

        return Stage(
            kind=Champion,
            config=settings,
            code_version=CODE_VERSION,
            inputs={f"policy_report/{name}": report for name, report in reports.items()},
            compute=compute,
        )

    result = materialize(context, stage, Tools(store, tracking, dvc), force=config.force)
    decision: Champion = result.value
    metadata = {**result.metadata, "decision": decision_text(decision), "rules": rules_table(decision)}
    if decision.policy is None:
        return result._replace(metadata=metadata)
    files = store.model_files(decision.policy)
    policy = files.adapter or files.base
    version, aliases = tracking.register(
        context.partition_key,
        decision.policy.mlflow_run_id,
        decision.policy.fingerprint,
        decision=decision.fingerprint,
        promoted=decision.promoted,
        description=f"{decision.method}, decided by Dagster run {context.run_id}",
        model=policy,
        attempt=metadata["mlflow_run_id"],
        again=config.force,
    )
    registered = f"aligned-policy-{context.partition_key} version {version} ({', '.join(aliases) or 'no alias'})"
    context.log.info(registered)
    metadata |= {"registered": registered, "policy": dg.MetadataValue.path(str(policy))}
    if files.adapter:
        metadata["base"] = dg.MetadataValue.path(str(files.base))
    return result._replace(metadata=metadata)


def recorded_reports(context: dg.AssetExecutionContext, store: ArtifactStore) -> dict[str, PolicyReport]:
    """The reports that Dagster records as materialized for this partition, by method; read from the artifact store.

    Of each method the latest that compares with the SFT report recorded last: a gain over another SFT checkpoint, by another
    evaluator, or on other prompts (an earlier recipe, base model, constitution or version of the data) is on another scale.
    """
    baseline = next(iter(fingerprints(context, "sft_report")), None)
    found = {}
    for name in METHODS:
        key = f"policy_report/{name}"
        records = [record for digest in fingerprints(context, key, LOOK_BACK) if (record := store.record(key, digest))]
        ours = next((record for record in records if record.inputs["sft_report"] == baseline), None)
        if ours:
            found[name] = PolicyReport.model_validate(ours.handle)
        elif records:
            context.log.warning(
                f"{name} is left out: its report compares with another SFT report than the last one, made with another SFT "
                f"checkpoint, evaluator or reward model, other prompts, or another constitution or sampling. To include it, "
                f"materialize aligned_policy/{name} and {key} again."
            )
    return found


def fingerprints(context: dg.AssetExecutionContext, asset: str, count: int = 1) -> list[str]:
    """Fingerprints of the artifacts that Dagster recorded last for an asset in this partition, the latest first."""
    found = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset.split("/")), asset_partitions=[context.partition_key]), limit=count
    ).records
    return [record.asset_materialization.metadata["fingerprint"].value for record in found]


def decision_text(decision: Champion) -> str:
    """The decision in one line, with the rules that the candidate fails."""
    if decision.method is None:
        return "no candidate: not promoted"
    failed = [rule["name"] for rule in decision.facts["rules"][decision.method] if not rule["passed"]]
    return f"{decision.method}: {'promoted' if decision.promoted else 'not promoted, fails ' + ', '.join(failed)}"


def rules_table(decision: Champion) -> dg.TableMetadataValue:
    """The gate's rules for all candidates, the best one's first; one row each: method, rule, whether it passes, why."""
    verdicts = sorted(decision.facts["rules"].items(), key=lambda item: item[0] != decision.method)
    return dg.MetadataValue.table(
        [
            dg.TableRecord({"method": name, "rule": rule["name"], "passes": rule["passed"], "reason": rule["reason"]})
            for name, verdict in verdicts
            for rule in verdict
        ],
        dg.TableSchema(
            [
                dg.TableColumn("method"),
                dg.TableColumn("rule"),
                dg.TableColumn("passes", "bool"),
                dg.TableColumn("reason"),
            ]
        ),
    )
