"""`make demo`: run the alignment job for one constitution in the project's Dagster instance, then print what came out.

    python -m dagster_project.demo [--constitution general] [--methods dpo,ppo] [--config run.yaml]

The run is the same that the UI would launch: multiprocess executor, partition, instance, MLflow.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from alignment.errors import UserError
from alignment.methods import METHODS
from assets.settings import PARTITIONS, RECIPE, chosen_methods, keys_without
from dagster_project.dead_runs import PROCESS, end_dead_runs, this_process
from resources.paths import PROJECT


def main() -> None:
    """Command line. Exit code 0 when every asset was materialized, whatever the promotion's decision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constitution", default="general", choices=PARTITIONS.get_partition_keys())
    parser.add_argument("--methods", type=_methods, help=f"only these, separated by commas: {','.join(METHODS)}")
    parser.add_argument("--config", type=Path, help="a Dagster run config (YAML), as in the launchpad")
    arguments = parser.parse_args()
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT / "dagster_home"))
    if arguments.methods:  # before the job is defined, which has no others, and for the processes of its steps
        os.environ["ALIGNMENT_METHODS"] = ",".join(arguments.methods)
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) if arguments.config else {}
    print(f"alignment pipeline: recipe {RECIPE.name}, constitution {arguments.constitution}", flush=True)
    begun = time.monotonic()
    with dg.DagsterInstance.get() as instance:
        assets = assets_of(arguments.methods) if arguments.methods else None
        result = run_alignment(instance, arguments.constitution, config, assets)
        rows = summary_rows(instance, result.run_id)
        print(summary_table(rows, result.run_id, time.monotonic() - begun))
        if not result.success:
            failed = [e.step_key for e in instance.all_logs(result.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)]
            print(f"FAILED: {', '.join(str(key) for key in failed)}. The lines above say why.")
            sys.exit(1)


def run_alignment(
    instance: dg.DagsterInstance, constitution: str, run_config: dict[str, Any], assets: list[str] | None = None
) -> dg.JobExecutionResult:
    """Run the alignment job for one constitution; `assets` (keys) restricts it to some of them."""
    from dagster_project.jobs import alignment

    return execute(instance, alignment, constitution, run_config, assets)


def execute(
    instance: dg.DagsterInstance,
    job: Callable[[], dg.JobDefinition],
    constitution: str,
    run_config: dict[str, Any],
    assets: list[str] | None = None,
) -> dg.JobExecutionResult:
    """Run a job, given by the function of `dagster_project.jobs` that makes it, for one constitution from this process."""
    end_dead_runs(instance)
    return dg.execute_job(
        dg.reconstructable(job),
        instance,
        run_config=run_config | {"loggers": {"console": {"config": {"log_level": "INFO"}}}},
        tags={"dagster/partition": constitution, PROCESS: this_process()},
        asset_selection=[dg.AssetKey(key.split("/")) for key in assets] if assets else None,
    )


def assets_of(chosen: Iterable[str]) -> list[str]:
    """The job's assets without the policies and reports of methods that were not chosen."""
    from dagster_project.jobs import alignment

    keys = {key.to_user_string() for key in alignment().asset_layer.executable_asset_keys}
    return sorted(keys - set(keys_without(chosen)))


def _methods(text: str) -> tuple[str, ...]:
    try:
        return chosen_methods(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def summary_rows(instance: dg.DagsterInstance, run_id: str) -> list[dict[str, Any]]:
    """One row per asset that the run materialized, in order: asset, seconds, reused or built, MLflow run, metrics."""
    rows = []
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
        event = entry.dagster_event
        metadata = {k: v.value for k, v in event.step_materialization_data.materialization.metadata.items()}
        rows.append({"asset": event.asset_key.to_user_string(), **metadata})
    return rows


def summary_table(rows: list[dict[str, Any]], run_id: str, seconds: float) -> str:
    """The closing table and the champion's decision."""
    lines = ["", f"{'asset':34} {'time':>8}  {'':6}  {'memory':>7}  {'MLflow run':12}  key metrics", "-" * 132]
    for row in rows:
        shown = [f"{label} {row[key]:.3g}" for key, label in KEY_METRICS.items() if isinstance(row.get(key), float)]
        state = "reused" if row["reused"] else "built"
        lines.append(
            f"{row['asset']:34} {row['seconds']:7.1f}s  {state:6}  {row['peak_memory_gb']:5.1f}GB  "
            f"{row['mlflow_run_id'][:12]:12}  {', '.join(shown)}"
        )
    lines += ["-" * 132, f"{len(rows)} assets in {seconds:.0f} s, Dagster run {run_id}"]
    lines += comparison(rows)
    decision = next((row for row in rows if row["asset"] == "champion"), None)
    if decision:
        lines += ["", f"champion: {decision['decision']}"]
        rules = [record.data for record in decision["rules"].records]  # the best candidate's first
        for rule in (rule for rule in rules if rule["method"] == rules[0]["method"]):
            lines.append(f"  {'passes' if rule['passes'] else 'FAILS '} {rule['rule']}: {rule['reason']}")
        for key, what in (("registered", "registered in MLflow"), ("policy", "its files"), ("base", "base model of its adapter")):
            if key in decision:
                lines.append(f"{what}: {decision[key]}")
    return "\n".join(lines)


KEY_METRICS = {
    "parameters": "parameters",
    "rows/train": "train rows",
    "rows/heldout": "held-out rows",
    "rows/reward_train": "reward pairs",
    "rows/evaluator_train": "evaluator pairs",
    "pairs": "pairs",
    "share_kept": "share kept",
    "share_compared": "share compared",
    "confidence": "mean label",
    "position/order_flips": "order decides",
    "train/loss_last": "train loss",
    "heldout/loss": "held-out loss",
    "heldout/accuracy": "held-out accuracy",
    "heldout/gain_over_length": "over length baseline",
    "train/rewards_margin_last": "margin",
    "train/scores_last": "score",
    "train/reward_last": "reward",
    "train/kl_last": "KL",
    "evaluator/score_sft": "evaluator's score of SFT",
    "evaluator/gain": "gain over SFT",
    "evaluator/gain_low": "low",
    "evaluator/gain_high": "high",
    "win_rate": "win rate",
    "promoted": "promoted",
}


def comparison(rows: list[dict[str, Any]]) -> list[str]:
    """Which method works: one line per policy report, the largest gain first, and the SFT checkpoint below."""
    reports = [row for row in rows if row["asset"].startswith("policy_report/")]
    if not reports:
        return []
    reports.sort(key=lambda row: -row["evaluator/gain"])
    lines = ["", "".join(f"{title:>{width}}" for title, width, _ in COMPARED), "-" * sum(width for _, width, _ in COMPARED)]
    for row in reports:
        lines.append(_compared(row["asset"].removeprefix("policy_report/"), row, "policy"))
    return [*lines, _compared("sft", reports[0], "sft")]


def _compared(name: str, row: dict[str, Any], side: str) -> str:
    cells = []
    for title, width, show in COMPARED:
        try:
            text = name if title == "method" else show(row, side)
        except KeyError:
            text = "-"  # not measured, or nothing to compare SFT with
        cells.append(f"{text:>{width}}")
    return "".join(cells)


def _against_sft(shown: str):
    return lambda row, side: shown.format(**{k.replace("/", "_"): v for k, v in row.items()}) if side == "policy" else "-"


def _either(key: str, shown: str):
    return lambda row, side: shown.format(row[key.format(side)])


# Column, its width, and how a report's row and a side (policy or sft) make its text.
COMPARED: list[tuple[str, int, Any]] = [
    ("method", 8, None),
    ("gain over SFT", 25, _against_sft("{evaluator_gain:+.2f} [{evaluator_gain_low:+.2f}, {evaluator_gain_high:+.2f}]")),
    ("wins against SFT", 20, _against_sft("{win_rate:.0%} [{win_rate_low:.0%}, {win_rate_high:.0%}]")),
    ("evaluator", 11, _either("evaluator/score_{}", "{:.2f}")),
    ("reward", 8, _either("reward_model/score_{}", "{:.2f}")),
    ("KL", 7, _against_sft("{kl_from_sft:.1f}")),
    ("length", 8, _either("length/{}", "{:.0f}")),
    ("EOS", 6, _either("eos_rate/{}", "{:.0%}")),
    ("refuses harmful", 17, _either("refusal_rate/{}", "{:.0%}")),
    ("harmless", 10, _either("over_refusal_rate/{}", "{:.0%}")),
    ("solves", 8, _either("problems/solved_{}", "{:.0%}")),
    ("time", 8, _against_sft("{training_seconds:.0f}s")),
    ("memory", 9, _against_sft("{training_peak_memory_gb:.1f}GB")),
]

if __name__ == "__main__":
    main()
