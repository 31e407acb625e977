"""`aligned_policy/<method>[c]` and `policy_report/<method>[c]`, generated from the table of methods."""

import json

import dagster as dg

from alignment.evaluation import CODE_VERSION as REPORT_VERSION
from alignment.evaluation import Measured, ReportConfig, evaluate_policy
from alignment.handles import Checkpoint, PolicyReport, PromptSet, RewardModel, SftDataset, SftReport
from alignment.methods import METHODS, Method, Training
from alignment.methods.pairs import PairsConfig
from assets.checks import alarm_specs
from assets.launch_config import launch_config
from assets.reward_models import domains_of
from assets.settings import PARTITIONS, constitution, dressed, recipe_config
from assets.sft_report import heldout_data, read_table, write_table
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking


def policy_asset(name: str, method: Method) -> dg.AssetsDefinition:
    """`aligned_policy/<name>[c]`: the SFT checkpoint aligned by one method."""
    key = f"aligned_policy/{name}"
    LaunchConfig = launch_config(key, recipe_config(key, method.config))

    @dg.asset(
        name=name,
        key_prefix="aligned_policy",
        partitions_def=PARTITIONS,
        ins={asset: dg.AssetIn() for asset in method.inputs},
        required_resource_keys={"store", "tracking", "dvc"},
        check_specs=alarm_specs(key),
        description=f"{method.title}: the aligned policy, trained from {', '.join(method.inputs)}.",
        **dressed("policies", {"trl", "peft"}, gpu=True),
    )
    def _policy(context: dg.AssetExecutionContext, config: LaunchConfig, **inputs):  # type: ignore[valid-type]
        tools = Tools(context.resources.store, context.resources.tracking, context.resources.dvc)

        def stage() -> Stage:
            settings = checked_config(method.config, config.model_dump())
            rules = constitution(context)
            read = {n: h for n, h in inputs.items() if not isinstance(settings, PairsConfig) or settings.reads(n)}

            def compute(work, log) -> Outcome:
                trained, metrics = method.train(
                    settings,
                    Training(
                        models={
                            n: tools.store.model_files(h) for n, h in inputs.items() if isinstance(h, Checkpoint | RewardModel)
                        },
                        folders={n: tools.store.path(h) for n, h in inputs.items()},
                        prompt_tags=rules.prompt_tags,
                        preference_domains=rules.preference_domains,
                        work=work.folder,
                        out=work.out,
                        log=log,
                    ),
                )
                start: Checkpoint = inputs[method.start]
                is_adapter = (work.out / "model" / "adapter_config.json").exists()
                return Outcome(
                    metrics=metrics,
                    curves=trained.curves,
                    curve_names=method.curves,
                    handle={"adapter_of": (start.adapter_of or start) if is_adapter else None},
                )

            return Stage(
                kind=Checkpoint,
                config=settings,
                code_version=method.code_version,
                inputs=read,
                constitution=rules,
                # The constitution's text holds them too, but also of policies that were trained when they were ignored.
                versions=domains_of(rules) if "human_preferences" in read else {},
                compute=compute,
                model_artifact=True,
            )

        return materialize(context, stage, tools, force=config.force)

    return _policy


def report_asset(name: str, method: Method) -> dg.AssetsDefinition:
    """`policy_report/<name>[c]`: the policy against the SFT checkpoint on held-out prompts."""
    LaunchConfig = launch_config(f"policy_report/{name}", recipe_config("policy_report", ReportConfig))

    @dg.asset(
        name=name,
        key_prefix="policy_report",
        partitions_def=PARTITIONS,
        ins={"policy": dg.AssetIn(key=dg.AssetKey(["aligned_policy", name]))},
        check_specs=alarm_specs(f"policy_report/{name}"),
        description=f"{method.title} against the SFT checkpoint, on held-out prompts, scored by the evaluator.",
        **dressed("evaluation", {"transformers"}, gpu=True),
    )
    def _report(
        context: dg.AssetExecutionContext,
        config: LaunchConfig,  # type: ignore[valid-type]
        policy: Checkpoint,
        sft_checkpoint: Checkpoint,
        sft_report: SftReport,
        evaluator: RewardModel,
        reward_model: RewardModel,
        prompts: PromptSet,
        sft_dataset: SftDataset,
        store: ArtifactStore,
        tracking: MlflowTracking,
        dvc: DvcData,
    ):
        def stage() -> Stage:
            settings = checked_config(ReportConfig, config.model_dump())
            rules = constitution(context)

            def compute(work, log) -> Outcome:
                folder = store.path(sft_report)
                metrics, table = evaluate_policy(
                    settings,
                    theirs=Measured.model_validate_json((folder / "measured.json").read_text(encoding="utf-8")),
                    base_rows=read_table(folder / "generations.jsonl"),
                    sft=store.model_files(sft_checkpoint),
                    policy=store.model_files(policy),
                    evaluator=store.model_files(evaluator),
                    reward_model=store.model_files(reward_model),
                    heldout=heldout_data(store, rules, prompts, sft_dataset),
                    log=log,
                )
                training = store.record(policy.asset, policy.fingerprint)
                metrics |= {"training/seconds": training.seconds, "training/peak_memory_gb": training.peak_memory_gb}
                report = {"method": name, "policy": policy.fingerprint, "metrics": metrics}
                (work.out / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
                write_table(work.out / "generations.jsonl", table)
                return Outcome(
                    metrics=metrics,
                    tables={"generations": table},
                    summary=_summary(name, metrics),
                    handle={"method": name, "policy": policy},
                )

            return Stage(
                kind=PolicyReport,
                config=settings,
                code_version=REPORT_VERSION,
                inputs={
                    "policy": policy,
                    "sft_checkpoint": sft_checkpoint,
                    "sft_report": sft_report,
                    "evaluator": evaluator,
                    "reward_model": reward_model,
                    "prompts": prompts,
                    "sft_dataset": sft_dataset,
                },
                constitution=rules,
                compute=compute,
            )

        return materialize(context, stage, Tools(store, tracking, dvc), force=config.force)

    return _report


def _summary(name: str, m: dict[str, float]) -> str:
    lines = [
        f"| | {name} | SFT |",
        "|---|---|---|",
        f"| evaluator's score | {m['evaluator/score_policy']:.3f} | {m['evaluator/score_sft']:.3f} |",
        f"| answer length (tokens) | {m['length/policy']:.1f} | {m['length/sft']:.1f} |",
        f"| answers that end by themselves | {m['eos_rate/policy']:.0%} | {m['eos_rate/sft']:.0%} |",
        f"| perplexity on held-out demonstrations | {m['perplexity/policy']:.2f} | {m['perplexity/sft']:.2f} |",
    ]
    for label, key in (
        ("refuses harmful prompts", "refusal_rate/{}"),
        ("refuses harmless prompts", "over_refusal_rate/{}"),
        ("solves held-out problems", "problems/solved_{}"),
    ):
        ours, theirs = key.format("policy"), key.format("sft")
        if ours in m:
            lines.append(f"| {label} | {m[ours]:.0%} | {m[theirs]:.0%} |")
    gain = f"{m['evaluator/gain']:+.3f}, 95 % interval [{m['evaluator/gain_low']:+.3f}, {m['evaluator/gain_high']:+.3f}]"
    return "\n".join(lines) + f"\n\nGain over SFT: {gain}; wins {m['win_rate']:.0%} of {m['prompts']:.0f} prompts."


policies = [policy_asset(name, method) for name, method in METHODS.items()]
reports = [report_asset(name, method) for name, method in METHODS.items()]
