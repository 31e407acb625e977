"""`make cai-demo`: a few prompts through critique and revise, initial against revised side by side.

    python -m dagster_project.cai_demo [--constitution general] [--prompts file] [--config run.yaml]

The run is the job `cai_demo` that the UI would launch: the SFT checkpoint and the judge are built if they are missing, and
reused otherwise.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import dagster as dg
import yaml

from alignment.critique_demo import comparison_text, prompts_of
from alignment.errors import UserError
from assets.settings import PARTITIONS, RECIPE
from dagster_project.demo import execute
from dagster_project.jobs import cai_demo
from resources.paths import PROJECT

WIDEST = 160  # columns of text that are still pleasant to read


def main() -> None:
    """Command line. Exit code 0 when the answers were revised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constitution", default="general", choices=PARTITIONS.get_partition_keys())
    parser.add_argument(
        "--prompts", type=Path, help="a .txt with a prompt on each line, or .jsonl, .csv, .parquet; else five of ours"
    )
    parser.add_argument("--config", type=Path, help="a Dagster run config (YAML), as in the launchpad")
    arguments = parser.parse_args()
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT / "dagster_home"))
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) if arguments.config else {}
    if arguments.prompts:
        try:
            prompts = prompts_of(arguments.prompts)
        except UserError as error:
            sys.exit(str(error))
        config.setdefault("ops", {}).setdefault("revised_examples", {}).setdefault("config", {})["prompts"] = prompts
    print(f"critique and revise: recipe {RECIPE.name}, constitution {arguments.constitution}", flush=True)
    with dg.DagsterInstance.get() as instance:
        result = execute(instance, cai_demo, arguments.constitution, config)
        failed = [e.step_key for e in instance.all_logs(result.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)]
        if not result.success:
            sys.exit(f"FAILED: {', '.join(str(key) for key in failed)}. The lines above say why.")
        (event,) = result.filter_events(lambda e: e.is_step_materialization and e.asset_key == dg.AssetKey("revised_examples"))
        metadata = event.step_materialization_data.materialization.metadata
    table = Path(metadata["artifact"].value) / "revisions.jsonl"
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").split("\n") if line]
    print(comparison_text(rows, min(shutil.get_terminal_size().columns, WIDEST)))
    print(f"\ntable: {table}\nin MLflow: {metadata['table'].value}, artifact revisions.json")


if __name__ == "__main__":
    main()
