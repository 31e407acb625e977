"""`champion[c]`: compares the reports that exist, applies the gate, and moves the aliases in MLflow's registry."""

import json

import dagster as dg

from alignment.handles import Champion, PolicyReport
from alignment.methods import METHODS
from alignment.promotion import CODE_VERSION, GateConfig, choose
from assets.launch_config import launch_config
from assets.settings import PARTITIONS, dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

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
            best, verdicts = choose({name: r.metrics for name, r in reports.items()}, settings)
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
                summary=decision_table(best, promoted, rules),
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
    metadata = {**result.metadata, "decision": decision_text(decision)}
    if decision.policy is None:
        return result._replace(metadata=metadata)
    version = tracking.register(
        context.partition_key,
        decision.policy.mlflow_run_id,
        decision.policy.fingerprint,
        promoted=decision.promoted,
        description=f"{decision.method}, decided by Dagster run {context.run_id}",
    )
    aliases = "challenger, champion" if decision.promoted else "challenger"
    registered = f"aligned-policy-{context.partition_key} version {version} ({aliases})"
    context.log.info(registered)
    return result._replace(metadata={**metadata, "registered": registered})


def recorded_reports(context: dg.AssetExecutionContext, store: ArtifactStore) -> dict[str, PolicyReport]:
    """The reports that Dagster records as materialized for this partition, by method; read from the artifact store."""
    found = {}
    for name in METHODS:
        records = context.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey(["policy_report", name]), asset_partitions=[context.partition_key]),
            limit=1,
        ).records
        if records:
            digest = records[0].asset_materialization.metadata["fingerprint"].value
            report = store.find(f"policy_report/{name}", digest)
            if isinstance(report, PolicyReport):
                found[name] = report
    return found


def decision_text(decision: Champion) -> str:
    """The decision in one line per rule."""
    verdict = decision.facts["rules"].get(decision.method, [])
    lines = [f"{decision.method or 'no candidate'}: {'promoted' if decision.promoted else 'not promoted'}"]
    return "\n".join(lines + [f"  {'passes' if r['passed'] else 'FAILS '} {r['name']}: {r['reason']}" for r in verdict])


def decision_table(best: str | None, promoted: bool, rules: dict[str, list[dict]]) -> str:
    """The decision as Markdown."""
    lines = [f"**{best or 'No candidate'}: {'promoted' if promoted else 'not promoted'}**", ""]
    for name, verdict in rules.items():
        lines += [f"| {name} | passes | why |", "|---|---|---|"]
        lines += [f"| {r['name']} | {'yes' if r['passed'] else 'NO'} | {r['reason']} |" for r in verdict]
        lines.append("")
    return "\n".join(lines)
