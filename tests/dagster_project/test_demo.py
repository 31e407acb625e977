"""The demo: its closing table, what its command refuses, and its exit code."""

import sys

import dagster as dg
import pytest

from alignment.errors import UserError
from assets.settings import methods
from dagster_project import demo
from dagster_project.demo import assets_of, summary_table

ROW = {"seconds": 1.234, "reused": False, "peak_memory_gb": 0.57, "mlflow_run_id": "0123456789abcdef0123456789abcdef"}


def row(asset: str, **values: object) -> dict[str, object]:
    return {**ROW, "asset": asset, **values}


def lines_of(*rows: dict[str, object]) -> list[str]:
    return summary_table(list(rows), "run-1", 12.6).splitlines()


def line(asset: str, *rows: dict[str, object]) -> str:
    (found,) = (text for text in lines_of(*rows) if text.startswith(asset))
    return found


def test_a_row_says_asset_time_state_memory_run_and_key_metrics():
    text = line("sft_checkpoint", row("sft_checkpoint", **{"train/loss_last": 5.4321, "heldout/loss": 4.0, "other": 1.0}))
    assert text.split() == (
        ["sft_checkpoint", "1.2s", "built", "0.6GB", "0123456789ab", "train", "loss", "5.43,", "held-out", "loss", "4"]
    )


def test_reused_and_built_are_told_apart():
    assert " reused " in line("prompts", row("prompts", reused=True))
    assert " built " in line("prompts", row("prompts"))


def test_columns_stand_under_each_other():
    rows = [
        row("prompts", **{"rows/train": 382.0}),
        row("constitutional_preference_pairs", seconds=1234.5, reused=True, pairs=15.0),
    ]
    texts = [line(str(r["asset"]), *rows) for r in rows]
    assert len({text.index("0123456789ab") for text in texts}) == 1
    assert len({text.index("GB") for text in texts}) == 1
    header = next(text for text in lines_of(*rows) if text.startswith("asset"))
    assert header.index("MLflow run") == texts[0].index("0123456789ab")
    assert header.index("key metrics") == texts[0].index("train rows")


def test_the_last_lines_count_assets_and_name_the_run():
    assert "2 assets in 13 s, Dagster run run-1" in lines_of(row("prompts"), row("sft_dataset"))


def report(method: str, gain: float, **values: float) -> dict[str, object]:
    sides = {f"{name}/{side}": 0.5 for side in ("policy", "sft") for name in ("eos_rate", "refusal_rate", "over_refusal_rate")}
    given = {
        "evaluator/gain": gain,
        "evaluator/gain_low": gain - 0.2,
        "evaluator/gain_high": gain + 0.2,
        "win_rate": 0.7,
        "win_rate_low": 0.6,
        "win_rate_high": 0.8,
        "evaluator/score_policy": 1.0,
        "evaluator/score_sft": 0.25,
        "reward_model/score_policy": 2.0,
        "reward_model/score_sft": 0.75,
        "kl/from_sft": 3.5,
        "length/policy": 41.0,
        "length/sft": 47.0,
        "training/seconds": 87.4,
        "training/peak_memory_gb": 3.9,
    }
    return row(f"policy_report/{method}", **sides | given | values)


def test_methods_are_compared_best_first_with_sft_below():
    texts = lines_of(report("ppo", 0.1), report("dpo", 0.4, **{"problems/solved_policy": 0.125}), row("prompts"))
    start = next(i for i, text in enumerate(texts) if text.startswith("  method"))
    assert [text.split()[0] for text in texts[start + 2 : start + 5]] == ["dpo", "ppo", "sft"]
    assert "+0.40 [+0.20, +0.60]" in texts[start + 2]
    assert "70% [60%, 80%]" in texts[start + 2]
    assert texts[start + 2].split()[-10:] == ["1.00", "2.00", "3.5", "41", "50%", "50%", "50%", "12%", "87s", "3.9GB"]
    assert texts[start + 3].count(" -") == 1  # no problems were given
    assert texts[start + 4].split()[1:] == ["-", "-", "0.25", "0.75", "-", "47", "50%", "50%", "50%", "-", "-", "-"]
    assert len({len(text) for text in texts[start : start + 5]}) == 1


def test_without_reports_nothing_is_compared():
    assert "gain over SFT" not in "\n".join(lines_of(row("prompts")))


def rules(*rows: tuple[str, str, bool, str]) -> dg.TableMetadataValue:
    names = ("method", "rule", "passes", "reason")
    columns = [dg.TableColumn(name, "bool" if name == "passes" else "string") for name in names]
    records = [dg.TableRecord(dict(zip(names, row, strict=True))) for row in rows]
    return dg.MetadataValue.table(records, dg.TableSchema(columns))


def test_the_champions_decision_its_rules_and_the_registration_come_last():
    judged = rules(
        ("dpo", "better than SFT", False, "gain -0.010"),
        ("dpo", "length", True, "30 tokens against 31"),
        ("ppo", "better than SFT", False, "gain -0.020"),  # not the best candidate's
    )
    registered = "aligned-policy-general version 1 (challenger)"
    decision = "dpo: not promoted, fails better than SFT"
    files = {"policy": "storage/artifacts/aligned_policy/dpo/1/model", "base": "storage/artifacts/base_model/2/model"}
    texts = lines_of(
        row("prompts"), row("champion", promoted=0.0, decision=decision, rules=judged, registered=registered, **files)
    )
    assert texts[-6:] == [
        "champion: dpo: not promoted, fails better than SFT",
        "  FAILS  better than SFT: gain -0.010",
        "  passes length: 30 tokens against 31",
        f"registered in MLflow: {registered}",
        "its files: storage/artifacts/aligned_policy/dpo/1/model",
        "base model of its adapter: storage/artifacts/base_model/2/model",
    ]


def test_without_a_champion_nothing_is_said_of_one():
    assert "champion" not in "\n".join(lines_of(row("prompts")))
    assert "registered" not in "\n".join(lines_of(row("champion", decision="no candidate: not promoted", rules=rules())))


def test_a_run_may_have_some_methods_only():
    chosen = assets_of(["dpo", "ppo"])
    assert {a for a in chosen if "/" in a} == {f"{s}/{m}" for s in ("aligned_policy", "policy_report") for m in ("dpo", "ppo")}
    assert {"champion", "sft_report", "base_model", "prompts"} <= set(chosen)


def test_a_run_that_failed_at_once_has_an_empty_table():
    assert "0 assets in 13 s, Dagster run run-1" in lines_of()


@pytest.mark.parametrize(
    "arguments", [["--constitution", "no_such"], ["--nonsense"], ["--methods", "dpo,no_such"], ["--methods", ","]]
)
def test_the_command_refuses_unknown_arguments(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delattr(demo, "run_alignment")  # nothing may be started
    with pytest.raises(SystemExit) as refused:
        demo.main()
    assert refused.value.code == 2
    assert "usage: " in capsys.readouterr().err


class Step:
    """Whether the job's second asset fails."""

    fails = False


def of_two_assets() -> dg.JobDefinition:
    """A job in place of `alignment`; a function of a module, as `execute` asks for."""

    @dg.asset
    def prompts() -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata=ROW)

    @dg.asset(deps=[prompts])
    def trained() -> dg.MaterializeResult:
        if Step.fails:
            raise dg.Failure("out of memory", allow_retries=False)
        return dg.MaterializeResult(metadata=ROW)

    job = dg.define_asset_job("alignment", executor_def=dg.in_process_executor)
    return dg.Definitions([prompts, trained], jobs=[job]).resolve_job_def("alignment")


@pytest.mark.parametrize("fails", [True, False])
def test_a_step_that_failed_is_named_and_makes_the_exit_code_1(monkeypatch, capsys, tmp_path, fails):
    monkeypatch.setattr(Step, "fails", fails)
    monkeypatch.setattr("dagster_project.jobs.alignment", of_two_assets)
    monkeypatch.setattr(dg.DagsterInstance, "get", staticmethod(dg.DagsterInstance.ephemeral))
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    if fails:
        with pytest.raises(SystemExit) as ended:
            demo.main()
        assert ended.value.code == 1
    else:
        demo.main()
    said = capsys.readouterr().out
    assert f"{1 if fails else 2} assets in " in said
    assert ("FAILED: trained. The lines above say why." in said) == fails


def test_the_job_runs_the_methods_that_the_environment_names(python, monkeypatch):
    code = (
        "from dagster_project.jobs import alignment\n"
        "print(*(key.to_user_string() for key in alignment().asset_layer.executable_asset_keys))"
    )
    assert set(python(code, ALIGNMENT_METHODS="dpo, ppo").stdout.split()) == set(assets_of(["dpo", "ppo"]))
    monkeypatch.setenv("ALIGNMENT_METHODS", "ddpo")
    with pytest.raises(UserError, match="methods: ddpo: choose from"):
        methods()


def test_the_methods_that_a_command_names_count_whatever_the_environment_names(python, tmp_path):
    script = (
        "import sys\n"
        "from dagster_project import demo\n"
        "def execute(instance, job, constitution, config, assets):\n"
        "    print(*assets, *(key.to_user_string() for key in job().asset_layer.executable_asset_keys))\n"
        "    sys.exit(0)\n"
        "demo.execute, sys.argv = execute, ['demo', '--methods', 'ppo']\n"
        "demo.main()"
    )
    done = python(script, ALIGNMENT_METHODS="dpo", DAGSTER_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    run = done.stdout.splitlines()[-1]
    assert "aligned_policy/ppo" in run
    assert sorted(run.split()) == sorted(assets_of(["ppo"]) * 2)
