"""The whole job, for real, on the tiny recipe: what Dagster, MLflow and the artifact store hold after it, and what a
later run reuses. The runs are those of `make demo`: multiprocess executor, one process per step.
"""

import base64
import hashlib
import json
import math
import operator
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from alignment.constitutions import load_constitution
from alignment.handles import parse_handle
from alignment.methods import METHODS
from assets.stage import git_commit
from dagster_project.definitions import defs
from resources.artifacts import file_hashes
from resources.tracking import flatten

pytestmark = pytest.mark.timeout(1800)  # three whole runs, by whichever test comes first
PROJECT = Path(__file__).parents[2]
JOB = defs.resolve_job_def("alignment")
ASSETS = sorted(key.to_user_string() for key in JOB.asset_layer.executable_asset_keys)
CHECKS = defs.resolve_asset_graph().asset_check_keys
PARTITIONED = {key.to_user_string() for key in JOB.asset_layer.executable_asset_keys if JOB.asset_layer.get(key).partitions_def}
POLICIES = [f"aligned_policy/{name}" for name in METHODS]
TRAINED = ["sft_checkpoint", "human_reward_model", "reward_model", "evaluator", *POLICIES]
LAYOUT = {
    "sft_checkpoint": {"optim": {"micro_batch_size": 4}},
    "human_reward_model": {"optim": {"micro_batch_size": 4}},
    "reward_model": {"optim": {"micro_batch_size": 8}},
    "evaluator": {"optim": {"gradient_checkpointing": True}},
    "aligned_policy__dpo": {"optim": {"micro_batch_size": 2, "save_every": 7}},
    "constitutional_preference_pairs": {"answer": {"batch_size": 3}, "chunk": 5},
    "ai_feedback": {"answer": {"batch_size": 3}, "chunk": 5},
    "aligned_policy__ppo": {"micro_batch_size": 4, "score_batch_size": 4, "save_every": 2},
    "sft_report": {"score_batch_size": 2},
    "policy_report__dpo": {"score_batch_size": 2},
}
FORCED = "prompts"
AFTER_CHANGE = ["aligned_policy/kto", "champion", "policy_report/kto"]  # of a setting of KTO


def ops(configs: Mapping[str, Any]) -> dict[str, Any]:
    return {"ops": {name: {"config": config} for name, config in configs.items()}}


# What changes in between changes three things that have nothing to do with each other: what is built is the union.
FIRST, CHANGED, AGAIN = range(3)
CONFIGS = [
    None,
    ops({**LAYOUT, "aligned_policy__kto": {"beta": 0.2}, FORCED: {"force": True}}),
    None,
]


class Run:
    """One Dagster run of the job, as Dagster and MLflow recorded it."""

    def __init__(self, sandbox: Any, instance: dg.DagsterInstance, number: int, run: dg.DagsterRun) -> None:
        self._sandbox, self._instance, self.number, self.run = sandbox, instance, number, run

    @cached_property
    def materializations(self) -> dict[str, dg.AssetMaterialization]:
        entries = self._instance.all_logs(self.run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
        found = [entry.dagster_event.step_materialization_data.materialization for entry in entries]
        assert len({m.asset_key for m in found}) == len(found)
        return {m.asset_key.to_user_string(): m for m in found}

    def metadata(self, asset: str) -> dict[str, Any]:
        return {key: value.value for key, value in self.materializations[asset].metadata.items()}

    @property
    def built(self) -> list[str]:
        return sorted(asset for asset in self.materializations if not self.metadata(asset)["reused"])

    @cached_property
    def mlflow(self) -> list[Any]:
        return self._sandbox.mlflow_runs({"dagster.run_id": self.run.run_id})

    @property
    def parent(self) -> Any:
        (found,) = (run for run in self.mlflow if run.data.tags["alignment.level"] == "run")
        return found

    @cached_property
    def children(self) -> dict[str, Any]:
        found = [run for run in self.mlflow if run.data.tags["alignment.level"] == "attempt"]
        assert len({run.data.tags["dagster.asset_key"] for run in found}) == len(found)
        return {run.data.tags["dagster.asset_key"]: run for run in found}


@pytest.fixture(scope="module")
def sandbox(new_sandbox):
    return new_sandbox("pipeline", fresh=True)


@pytest.fixture(scope="module")
def output(sandbox) -> str:
    """What the runs printed, one after the other."""
    return sandbox.start_demo(CONFIGS).finish(timeout=1500)


@pytest.fixture(scope="module")
def runs(sandbox, output):
    with sandbox.instance() as instance:
        records = instance.get_run_records(ascending=True)
        assert len(records) == len(CONFIGS)
        yield [Run(sandbox, instance, number, record.dagster_run) for number, record in enumerate(records)]


@pytest.fixture(scope="module")
def first(runs) -> Run:
    return runs[FIRST]


def artifact(run: Run, asset: str) -> Path:
    """The artifact's folder as it was at the end of the run: the second run replaced one and put the first aside."""
    folder = Path(run.metadata(asset)["artifact"])
    if asset == FORCED and run.number < CHANGED:
        return folder.parents[1] / ".replaced" / asset / folder.name
    return folder


def record(run: Run, asset: str) -> dict[str, Any]:
    return json.loads((artifact(run, asset) / "artifact.json").read_text(encoding="utf-8"))


def mlflow_folder(sandbox: Any, run_id: str) -> Path:
    return sandbox.storage / "mlartifacts" / run_id / "artifacts"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def candidate(run: Run) -> str:
    """The method of the policy that the run's champion decision is about."""
    return json.loads((artifact(run, "champion") / "decision.json").read_text(encoding="utf-8"))["candidate"]


everywhere = pytest.mark.parametrize("asset", ASSETS)


# --- the first run ----------------------------------------------------------------------------------------------------


def test_every_asset_is_built_for_the_constitution(first):
    assert first.run.status == dg.DagsterRunStatus.SUCCESS
    assert sorted(first.materializations) == first.built == ASSETS
    for asset, materialization in first.materializations.items():
        assert materialization.partition == ("general" if asset in PARTITIONED else None)


def test_dagster_shows_version_link_curve_and_metrics(first, sandbox):
    for asset, materialization in first.materializations.items():
        metadata, child = first.metadata(asset), first.children[asset]
        fingerprint = metadata["fingerprint"]
        assert len(fingerprint) == 64
        assert materialization.tags["dagster/data_version"] == fingerprint
        assert metadata["artifact"] == str(sandbox.storage / "artifacts" / asset / fingerprint)
        assert metadata["mlflow_run_id"] == child.info.run_id
        assert metadata["mlflow_run"].endswith(f"/#/experiments/{child.info.experiment_id}/runs/{child.info.run_id}")
        assert metadata["seconds"] > 0
        assert 0 < metadata["peak_memory_gb"] < 6
        for name, value in record(first, asset)["handle"]["metrics"].items():
            assert metadata[name] == pytest.approx(value)


@pytest.mark.parametrize("asset", TRAINED)
def test_trained_assets_carry_their_loss_curve_inline(first, asset):
    text = first.metadata(asset)["curve"]
    start = "![curve](data:image/png;base64,"
    assert text.startswith(start)
    picture = base64.b64decode(text.removeprefix(start).removesuffix(")"), validate=True)
    assert picture.startswith(b"\x89PNG")
    assert picture == (artifact(first, asset) / "curve.png").read_bytes()


def test_mlflow_has_one_parent_and_one_child_per_asset(first):
    assert first.parent.info.status == "FINISHED"
    assert first.parent.info.run_name == "alignment[general]"
    assert sorted(first.children) == ASSETS
    for child in first.children.values():
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == first.parent.info.run_id


@everywhere
def test_a_child_has_every_tag_of_the_contract(first, sandbox, asset):
    tags = first.children[asset].data.tags
    pinned = yaml.safe_load((sandbox.data / "data.dvc").read_text())["outs"][0]["md5"].removesuffix(".dir")
    expected = {
        "dagster.run_id": first.run.run_id,
        "dagster.root_run_id": first.run.run_id,
        "dagster.asset_key": asset,
        "dagster.retry_number": "0",
        "alignment.fingerprint": first.metadata(asset)["fingerprint"],
        "alignment.stage": asset.split("/")[0],
        "alignment.reused": "false",
        "alignment.computed_by": first.children[asset].info.run_id,
        "dvc.md5": pinned,
    }
    assert expected.items() <= tags.items()
    commit = r"[0-9a-f]{40}(-dirty)?" if git_commit() else ""
    assert re.fullmatch(commit, tags["git.commit"])
    assert tags.get("dagster.partition", "") in ({"general"} if asset in PARTITIONED else {"general", ""})
    assert tags["dagster.run_url"].endswith(f"/runs/{first.run.run_id}")


@everywhere
def test_a_child_has_the_resolved_configuration_and_the_final_metrics(first, asset):
    child, content = first.children[asset], record(first, asset)
    assert child.data.params == {key: str(value) for key, value in flatten(content["config"]).items()}
    final = {f"final/{key}": value for key, value in content["handle"]["metrics"].items()}
    assert final
    assert {k: v for k, v in child.data.metrics.items() if k.startswith("final/")} == pytest.approx(final)


@pytest.mark.parametrize("asset", TRAINED)
def test_training_is_logged_step_by_step(first, sandbox, asset):
    curve, final = ("loss/policy", "train/policy_loss") if asset == "aligned_policy/ppo" else ("loss", "train/loss")
    history = sandbox.mlflow().get_metric_history(first.children[asset].info.run_id, curve)
    assert [point.step for point in history] == list(range(1, len(history) + 1))
    assert len(history) >= 3
    assert all(math.isfinite(point.value) for point in history)
    mean = sum(point.value for point in history) / len(history)
    assert record(first, asset)["handle"]["metrics"][final] == pytest.approx(mean, abs=1e-6)


def test_data_sets_are_inputs_with_the_md5_that_dvc_has_for_the_file(first, sandbox):
    demonstrations, preferences = ["demonstrations", "critiques"], ["preferences", "critiques"]
    read = {
        "sft_dataset": demonstrations,
        "human_preferences": preferences,
        "prompts": ["prompts", "reasoning"],
        # And what learns from these data sets.
        "sft_checkpoint": demonstrations,
        "evaluator": preferences,
        "aligned_policy/orpo": preferences,
        "aligned_policy/dpo": [],  # learns from no human pair here
        "aligned_policy/grpo": ["prompts", "reasoning"],
    }
    for asset, files in read.items():
        logged = {i.dataset.name: i.dataset for i in first.children[asset].inputs.dataset_inputs}
        made = {name for name, dataset in logged.items() if "generated/" in dataset.source}
        assert sorted(set(logged) - made) == sorted(files)
        for name, dataset in logged.items():
            if name in made:
                continue
            content = (sandbox.data / "data" / f"{name}.jsonl").read_bytes()
            assert dataset.digest == f"dvc-{hashlib.md5(content).hexdigest()}"
            assert json.loads(dataset.source) == {"path": f"data/{name}.jsonl"}
            assert json.loads(dataset.profile) == {"num_rows": content.count(b"\n")}


def test_pictures_and_tables_are_in_mlflow(first, sandbox):
    for asset in TRAINED:
        assert "plots/curve.png" in names(mlflow_folder(sandbox, first.children[asset].info.run_id))
    table = json.loads((mlflow_folder(sandbox, first.children["policy_report/dpo"].info.run_id) / "generations.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 8
    assert {"prompt", "base", "sft", "policy", "score_sft", "score_policy"} <= set(rows[0])
    heldout = (artifact(first, "prompts") / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert {row["prompt"] for row in rows} <= {json.loads(line)["prompt"] for line in heldout}


@everywhere
def test_the_record_beside_an_artifact_says_where_it_came_from(first, sandbox, asset):
    folder, content = artifact(first, asset), record(first, asset)
    handle = parse_handle(json.dumps(content["handle"]))
    assert (handle.asset, handle.fingerprint) == (asset, folder.name)
    assert handle.mlflow_run_id == content["mlflow_run_id"] == first.children[asset].info.run_id
    assert content["dagster_run_id"] == first.run.run_id
    assert content["files"] == {name: digest for name, digest in file_hashes(folder).items() if name != "artifact.json"}
    assert {"python", "torch", "transformers", "trl", "peft", "dagster", "mlflow", "dvc"} <= set(content["versions"])
    assert content["dvc_md5"] == first.children[asset].data.tags["dvc.md5"]
    assert (content["git_commit"] or "") == first.children[asset].data.tags["git.commit"]
    assert content["seconds"] > 0
    assert content["config"]


@pytest.mark.parametrize(
    ("asset", "files"),
    [
        ("base_model", {"model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/chat_template.jinja"}),
        ("sft_dataset", {"train.jsonl", "heldout.jsonl"}),
        ("human_preferences", {"reward_train.jsonl", "evaluator_train.jsonl", "heldout.jsonl"}),
        ("prompts", {"train.jsonl", "heldout.jsonl"}),
        ("sft_checkpoint", {"model/adapter_model.safetensors", "model/adapter_config.json", "curve.png"}),
        ("constitutional_preference_pairs", {"pairs.jsonl", "rounds.jsonl"}),
        ("ai_feedback", {"comparisons.jsonl", "heldout.jsonl"}),
        ("reward_model", {"model/adapter_model.safetensors", "curve.png"}),
        ("aligned_policy/dpo", {"model/adapter_model.safetensors", "model/adapter_config.json", "curve.png"}),
        ("policy_report/dpo", {"report.json", "generations.jsonl"}),
        ("champion", {"decision.json"}),
    ],
)
def test_an_artifact_holds_the_files_its_handle_promises(first, asset, files):
    assert files <= names(artifact(first, asset))


def test_only_partitioned_assets_have_a_partition(first):
    partitions = {asset: record(first, asset)["handle"]["partition"] for asset in ASSETS}
    assert partitions == {asset: "general" if asset in PARTITIONED else None for asset in ASSETS}


def test_records_name_their_inputs_by_fingerprint(first):
    known = {first.metadata(asset)["fingerprint"] for asset in ASSETS}
    inputs = {asset: record(first, asset)["inputs"] for asset in ASSETS}
    assert inputs["base_model"] == {"source": "tiny:0"}
    assert set(inputs["sft_dataset"]) == {"data/demonstrations.jsonl", "data/critiques.jsonl"}
    for asset in set(ASSETS) - {"base_model", "sft_dataset", "human_preferences", "prompts"}:
        assert inputs[asset]
        assert set(inputs[asset].values()) <= known
    assert inputs["aligned_policy/dpo"] == {
        name: first.metadata(name)["fingerprint"] for name in ("sft_checkpoint", "constitutional_preference_pairs")
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_the_evaluator_never_trains_a_policy(first, policy):
    ancestors = set()
    todo = [policy]
    by_fingerprint = {first.metadata(asset)["fingerprint"]: asset for asset in ASSETS}
    while todo:
        for value in record(first, todo.pop())["inputs"].values():
            if value in by_fingerprint and by_fingerprint[value] not in ancestors:
                ancestors.add(by_fingerprint[value])
                todo.append(by_fingerprint[value])
    assert METHODS[policy.split("/")[1]].start in ancestors
    assert "evaluator" not in ancestors


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_an_adapter_over_the_base_model(first, policy):
    assert record(first, policy)["handle"]["adapter_of"]["fingerprint"] == first.metadata("base_model")["fingerprint"]
    assert "model/adapter_model.safetensors" in names(artifact(first, policy))


def test_handles_lie_by_asset_and_partition(first, sandbox):
    found = {name for name in names(sandbox.storage / "handles") if not name.startswith(".runs/")}
    assert found == {f"{asset}/general.json" if asset in PARTITIONED else f"{asset}.json" for asset in ASSETS}


def test_nothing_is_left_at_work_and_the_data_is_as_pulled(first, sandbox):
    assert names(sandbox.storage / "artifacts" / ".work") == set()
    pinned = yaml.safe_load((sandbox.data / "data.dvc").read_text())["outs"][0]["md5"]
    manifest = json.loads((sandbox.data / "dvc_store" / "files" / "md5" / pinned[:2] / pinned[2:]).read_text())
    assert {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in (sandbox.data / "data").iterdir()} == {
        row["relpath"]: row["md5"] for row in manifest
    }


def test_a_policy_is_registered_as_challenger_and_champion_only_if_promoted(first, sandbox):
    client = sandbox.mlflow()
    name = candidate(first)
    policy = first.metadata(f"aligned_policy/{name}")["fingerprint"]
    versions = {v.tags["alignment.fingerprint"]: v for v in client.search_model_versions("name = 'aligned-policy-general'")}
    assert versions[policy].run_id == first.children[f"aligned_policy/{name}"].info.run_id
    decision = json.loads((artifact(first, "champion") / "decision.json").read_text())
    assert set(decision["rules"]) == set(METHODS)
    assert decision["promoted"] == all(rule["passed"] for rule in decision["rules"][name])
    assert all(rule["reason"] for rules in decision["rules"].values() for rule in rules)
    aliases = client.get_registered_model("aligned-policy-general").aliases
    assert "challenger" in aliases
    assert ("champion" in aliases) == decision["promoted"]
    judged = decision["rules"][name]
    assert first.metadata("champion")["decision"] == (
        f"{name}: promoted"
        if decision["promoted"]
        else f"{name}: not promoted, fails {', '.join(rule['name'] for rule in judged if not rule['passed'])}"
    )
    shown = [record.data for record in first.metadata("champion")["rules"].records]
    assert [row["method"] for row in shown[: len(judged)]] == [name] * len(judged)  # the best candidate's come first
    expected = [
        {"method": method, "rule": rule["name"], "passes": rule["passed"], "reason": rule["reason"]}
        for method, rules in decision["rules"].items()
        for rule in rules
    ]
    by_name = operator.itemgetter("method", "rule")
    assert sorted(shown, key=by_name) == sorted(expected, key=by_name)
    assert first.metadata("champion")["registered"] == (
        f"aligned-policy-general version {versions[policy].version} "
        f"({'challenger, champion' if decision['promoted'] else 'challenger'})"
    )


def test_pairs_are_what_the_rounds_say(first):
    folder = artifact(first, "constitutional_preference_pairs")
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = {r["id"]: r for r in map(json.loads, (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines())}
    metrics = record(first, "constitutional_preference_pairs")["handle"]["metrics"]
    assert len(pairs) == metrics["pairs"] > 0
    assert len(rounds) == metrics["prompts"]
    filtered = sum(value for name, value in metrics.items() if name.startswith("filtered/"))
    assert metrics["pairs"] + filtered == metrics["prompts"]
    assert metrics["share_kept"] == len(pairs) / len(rounds)
    taken = [r for one in rounds.values() for r in one["revisions"]]
    assert metrics["share_no_violations"] == sum(not r["revised"] for r in taken) / len(taken)
    for side in ("initial", "final"):
        mean = sum(one[f"reward_{side}"] for one in rounds.values()) / len(rounds)
        assert metrics[f"reward/{side}"] == pytest.approx(mean)
    for pair in pairs:
        assert pair["rejected"] == rounds[pair["id"]]["initial"]
        assert pair["chosen"] == rounds[pair["id"]]["final"]
    ids = {p.id for p in load_constitution(PROJECT / "conf" / "constitutions" / "general.yaml").principles}
    assert {r["principle"] for one in rounds.values() for r in one["revisions"]} <= ids


def evaluated(sandbox, run: Run) -> dict[tuple[str, str], Any]:
    with sandbox.instance() as instance:
        entries = instance.all_logs(run.run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    found = [entry.dagster_event.asset_check_evaluation_data for entry in entries]
    return {(e.asset_key.to_user_string(), e.check_name): e for e in found}


def test_every_asset_check_is_decided_and_none_that_blocks_fails(runs, first, sandbox):
    found = evaluated(sandbox, first)
    specs = {(k.asset_key.to_user_string(), k.name): defs.resolve_asset_graph().get_check_spec(k) for k in CHECKS}
    assert set(found) == set(specs)
    for key, evaluation in found.items():
        assert "not measured" not in evaluation.description
        assert evaluation.passed or not specs[key].blocking  # a model with random weights may well be warned of
    # The same is said of what is reused.
    said = {key: evaluation.description for key, evaluation in found.items()}
    assert {key: e.description for key, e in evaluated(sandbox, runs[AGAIN]).items()} == said


LOAD_AND_GENERATE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, *adapters = sys.argv[1:]
out = []
for folder in adapters:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(base)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in ("How long do eggs boil?", "Is it safe to mix cleaners?", "Hello")
    ]
    batches = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
    with torch.inference_mode():
        before = [plain(**batch).logits[0, -1] for batch in batches]
        model = PeftModel.from_pretrained(plain, folder).eval()
        after = [model(**batch).logits[0, -1] for batch in batches]
        tokens = [model.generate(**batch, max_new_tokens=24, do_sample=False)[0].tolist() for batch in batches]
    change = max((a - b).abs().max().item() for a, b in zip(after, before))
    out.append({"tokens": tokens, "logits": [a.tolist() for a in after], "change": change})
print(json.dumps(out))
"""


def test_models_in_mlflow_load_with_plain_libraries_in_a_new_process_and_answer_the_same(first, sandbox, python):
    base = artifact(first, "base_model") / "model"
    stored = [artifact(first, asset) / "model" for asset in ("sft_checkpoint", "aligned_policy/dpo")]
    logged = [
        mlflow_folder(sandbox, first.children[asset].info.run_id) / "model" for asset in ("sft_checkpoint", "aligned_policy/dpo")
    ]
    for ours, theirs in zip(stored, logged, strict=True):
        assert file_hashes(ours) == file_hashes(theirs)
        assert not [name for name in names(theirs) if name.endswith((".bin", ".pt", ".pkl"))]
    outside = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}  # nothing of this project is needed to load them
    done = python(LOAD_AND_GENERATE, str(base), *map(str, [*logged, *stored]), cwd=sandbox.folder, **outside)
    assert done.returncode == 0, done.stderr
    sft, policy, sft_stored, policy_stored = json.loads(done.stdout.splitlines()[-1])
    assert sft == sft_stored
    assert policy == policy_stored
    assert sft["change"] > 1e-4  # the adapter does something
    assert policy["logits"] != sft["logits"]


# --- later runs -------------------------------------------------------------------------------------------------------


def computed_by(runs: list[Run], asset: str) -> Run:
    """The run that made what the last one has of an asset."""
    return runs[CHANGED if asset == FORCED else FIRST]


def test_the_first_run_again_reuses_everything_and_trains_nothing(runs, first):
    again = runs[AGAIN]
    assert again.built == []
    assert sorted(again.children) == ASSETS
    for asset in ASSETS:
        maker = computed_by(runs, asset)
        assert again.metadata(asset)["fingerprint"] == first.metadata(asset)["fingerprint"]
        assert again.materializations[asset].tags == {
            **again.materializations[asset].tags,
            "dagster/data_version": first.metadata(asset)["fingerprint"],
        }
        child = again.children[asset]
        assert child.data.tags["alignment.reused"] == "true"
        assert child.data.tags["alignment.computed_by"] == maker.children[asset].info.run_id
        assert {name for name in child.data.metrics if not name.startswith("final/")} == set()
        assert {k: v for k, v in child.data.metrics.items() if k.startswith("final/")} == {
            k: v for k, v in maker.children[asset].data.metrics.items() if k.startswith("final/")
        }
        assert record(again, asset)["dagster_run_id"] == maker.run.run_id
    assert again.parent.info.run_id != first.parent.info.run_id
    assert again.parent.info.status == "FINISHED"


def test_another_setting_builds_what_it_changes_and_what_follows_that_and_force_one_asset_more(runs, first):
    changed = runs[CHANGED]
    assert changed.built == sorted([*AFTER_CHANGE, FORCED])
    assert changed.children["aligned_policy/kto"].data.params["beta"] == "0.2"
    for asset in AFTER_CHANGE:
        assert changed.metadata(asset)["fingerprint"] != first.metadata(asset)["fingerprint"]
    # What the first run made is still there.
    assert artifact(first, "aligned_policy/kto").exists()


def test_another_layout_changes_nothing_nor_does_what_force_computes_anew(runs, first):
    changed = runs[CHANGED]
    for asset in set(ASSETS) - set(AFTER_CHANGE):
        assert changed.metadata(asset)["fingerprint"] == first.metadata(asset)["fingerprint"]
    assert record(changed, FORCED)["dagster_run_id"] == changed.run.run_id
    assert changed.children["aligned_policy/dpo"].data.params["optim.micro_batch_size"] == "2"


def test_what_force_replaced_is_kept_aside_and_was_the_same(runs, first):
    assert artifact(first, FORCED) != artifact(runs[CHANGED], FORCED)
    assert record(first, FORCED)["dagster_run_id"] == first.run.run_id
    assert record(first, FORCED)["files"] == record(runs[CHANGED], FORCED)["files"]


def test_the_registry_has_one_version_per_candidate(runs, first, sandbox):
    versions = sandbox.mlflow().search_model_versions("name = 'aligned-policy-general'")
    policies = {run.metadata(f"aligned_policy/{candidate(run)}")["fingerprint"] for run in runs}
    assert sorted(v.tags["alignment.fingerprint"] for v in versions) == sorted(policies)
    challenger = sandbox.mlflow().get_model_version_by_alias("aligned-policy-general", "challenger")
    last = runs[AGAIN]  # back to the first run's policies
    assert challenger.tags["alignment.fingerprint"] == last.metadata(f"aligned_policy/{candidate(last)}")["fingerprint"]


def test_each_run_has_a_parent_and_no_child_too_many(runs, sandbox):
    everything = sandbox.mlflow_runs({})
    assert len(everything) == len(runs) * (1 + len(ASSETS))
    assert {run.info.status for run in everything} == {"FINISHED"}


def test_the_demo_prints_a_table_per_run(output, runs):
    for run in runs:
        assert f"{len(ASSETS)} assets in " in output
        assert f"Dagster run {run.run.run_id}" in output
    tables = output.split("key metrics")[1:]
    assert len(tables) == len(runs)
    assert [table.split("assets in")[0].count(" built ") for table in tables] == [len(ASSETS), len(AFTER_CHANGE) + 1, 0]
    assert sum(output.count(f"champion: {name}: ") for name in METHODS) == len(runs)
