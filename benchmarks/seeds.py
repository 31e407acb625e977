"""The pipeline over several seeds: is a method's gain over the SFT checkpoint more than luck?

    python -m benchmarks.seeds BASE DATA [--recipe demo] [--constitution general] [--methods dpo,ppo] [--seeds 0,1,2] [--jobs 1]

BASE is the folder of the base model (an artifact's `model/`), DATA the folder of the curated files. Every stage runs as the
recipe says, by the library alone: no Dagster, MLflow or DVC, so that it also runs on a GPU machine that has none of them. Seed s
is added (times 100) to the seed of every stage; data and split stay. Each seed is a process of its own, `--jobs` at a time.
Prints Markdown tables; `--out` keeps what each seed made, the constitutional pairs among it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alignment.methods import METHODS, Training
from alignment.models import Config, ModelFiles
from alignment.progress import Log
from alignment.recipes import Recipe, load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "conf" / "recipes"
CONSTITUTIONS = RECIPES.with_name("constitutions")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="demo", help="a name in conf/recipes, or a path")
    parser.add_argument("--constitution", default="general")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    parser.add_argument("--out", type=Path, help="keep what was made here")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is not None:
        run(options, options.seed, options.out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)

        def one(seed: int) -> dict[str, Any]:
            folder = out / f"seed-{seed}"
            arguments = [sys.executable, "-m", "benchmarks.seeds", *sys.argv[1:], "--seed", str(seed), "--out", str(folder)]
            with open(out / f"seed-{seed}.log", "w") as log:
                subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT, check=True)
            return json.loads((folder / "metrics.json").read_text())

        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = dict(zip(options.seeds.split(","), pool.map(one, map(int, options.seeds.split(","))), strict=True))
    print(tables(results))


def tables(results: dict[str, dict[str, Any]]) -> str:
    """What came out, seed by seed, as Markdown."""
    lines = [
        "| seed | reward model right | over the length baseline | evaluator right | over the length baseline | pairs kept |",
        "|---|---|---|---|---|---|",
    ]
    for seed, r in results.items():
        cells = [_interval(r[m], f"heldout/{k}") for m in ("reward_model", "evaluator") for k in ("accuracy", "gain_over_length")]
        lines.append(f"| {seed} | {' | '.join(cells)} | {r['pairs']['pairs']:.0f} of {r['pairs']['prompts']:.0f} |")
    lines += [
        "",
        "| method | seed | gain over SFT | wins | reward gain | KL | length / SFT | EOS / SFT | over-refusal / SFT | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for seed, r in results.items():
            if method not in r["reports"]:
                continue
            m = r["reports"][method]
            shares = " | ".join(f"{m[f'{k}/policy']:.0%} / {m[f'{k}/sft']:.0%}" for k in ("eos_rate", "over_refusal_rate"))
            lines.append(
                f"| {method} | {seed} | {_interval(m, 'evaluator/gain')} | {_interval(m, 'win_rate')} | "
                f"{m['reward_model/gain']:+.2f} | {m['kl/from_sft']:.1f} | {m['length/policy']:.0f} / {m['length/sft']:.0f} | "
                f"{shares} | {r['seconds'][f'aligned_policy/{method}']:.0f} |"
            )
    return "\n".join(lines)


def run(options: argparse.Namespace, seed: int, out: Path) -> None:
    """All stages at one seed; their metrics go to `out/metrics.json`."""
    from alignment.constitutions import load_constitution, prompts_to_criticise, prompts_under
    from alignment.critic import LocalAnswerer
    from alignment.critique import CritiqueConfig, critique_and_revise, preference_pairs, reward_judge
    from alignment.datasets import (
        HumanPreferencesConfig,
        PromptsConfig,
        SftDatasetConfig,
        build_human_preferences,
        build_prompts,
        build_sft_dataset,
        write_jsonl,
    )
    from alignment.evaluation import Heldout, ReportConfig, SftReportConfig, evaluate_policy, measure_sft
    from alignment.models import load_causal_lm, load_reward_model, load_tokenizer
    from alignment.readers import read_records
    from alignment.records import Conversation, PreferencePair, Problem, Prompt
    from alignment.reward import RewardConfig, RewardMixConfig, reward_training_pairs, train_reward_model
    from alignment.sft import SftConfig, train_sft

    path = Path(options.recipe)
    recipe = load_recipe(path if path.suffix else RECIPES / f"{path.name}.yaml", shipped=RECIPES)
    rules = load_constitution(CONSTITUTIONS / f"{options.constitution}.yaml")
    base = ModelFiles(options.base)
    log = Log(say=lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", flush=True))
    result: dict[str, Any] = {"reports": {}, "seconds": {}, "platform": platform.machine()}
    begun = time.monotonic()

    def places(stage: str) -> dict[str, Path]:
        folders = {"work": out / stage / "work", "out": out / stage}
        folders["work"].mkdir(parents=True)
        return folders

    def done(stage: str) -> None:
        nonlocal begun
        result["seconds"][stage] = time.monotonic() - begun
        begun = time.monotonic()
        log.say(f"== {stage}: {result['seconds'][stage]:.1f} s")

    for stage, kind, build in (
        ("sft_dataset", SftDatasetConfig, build_sft_dataset),
        ("human_preferences", HumanPreferencesConfig, build_human_preferences),
        ("prompts", PromptsConfig, build_prompts),
    ):
        config = recipe.config(stage, kind)
        names = [n for value in config.model_dump().values() if isinstance(value, list) for n in value]
        build(config, {n: str(options.data / n.removeprefix("data/")) for n in names}, places(stage)["out"])
    human = {
        n: read_records(out / "human_preferences" / f"{n}.jsonl", PreferencePair)
        for n in ("reward_train", "evaluator_train", "heldout")
    }
    conversations = {side: read_records(out / "sft_dataset" / f"{side}.jsonl", Conversation) for side in ("train", "heldout")}
    heldout = Heldout(
        prompts=tuple(prompts_under(read_records(out / "prompts" / "heldout.jsonl", Prompt), rules, ())),
        demonstrations=tuple(conversations["heldout"]),
        problems=tuple(read_records(out / "prompts" / "problems_heldout.jsonl", Problem)),
    )
    done("data")

    def scorer(stage: str, pairs, kind: type[RewardConfig] = RewardConfig) -> ModelFiles:
        config = seeded(recipe, stage, kind, seed)
        _, result[stage], _ = train_reward_model(config, base, pairs(config), human["heldout"], **places(stage), log=log)
        done(stage)
        return ModelFiles(base.base, out / stage / "model")

    human_reward_model = scorer("human_reward_model", lambda _: human["reward_train"])
    evaluator = scorer("evaluator", lambda _: human["evaluator_train"])
    config = seeded(recipe, "sft_checkpoint", SftConfig, seed)
    _, result["sft"] = train_sft(
        config, base, conversations["train"], conversations["heldout"], **places("sft_checkpoint"), log=log
    )
    sft = ModelFiles(base.base, out / "sft_checkpoint" / "model")
    done("sft_checkpoint")

    stage = "constitutional_preference_pairs"
    config = seeded(recipe, stage, CritiqueConfig, seed)
    asked = prompts_to_criticise(read_records(out / "prompts" / "train.jsonl", Prompt), rules, config.prompt_tags)
    tokenizer = load_tokenizer(base.base)
    folders = places(stage)
    critic = LocalAnswerer(load_causal_lm(sft, config.load), tokenizer)
    judge = load_reward_model(human_reward_model, config.load, tokenizer=tokenizer)
    revised = critique_and_revise(
        critic,
        critic,
        asked[: config.max_prompts or None],
        rules,
        config,
        judge=reward_judge(judge, tokenizer, config.score_batch_size),
        work=folders["work"],
        log=log,
    )
    pairs, reasons = preference_pairs(revised, rules, config.filters)
    write_jsonl(folders["out"] / "pairs.jsonl", pairs)
    write_jsonl(folders["out"] / "rounds.jsonl", revised)
    result["pairs"] = {"pairs": len(pairs), "prompts": len(revised), **reasons}
    done(stage)
    reward_model = scorer(
        "reward_model", lambda config: reward_training_pairs(human["reward_train"], pairs, config), RewardMixConfig
    )

    measured, _, table = measure_sft(
        seeded(recipe, "sft_report", SftReportConfig, seed),
        base=base,
        sft=sft,
        evaluator=evaluator,
        reward_model=reward_model,
        heldout=heldout,
        log=log,
    )
    done("sft_report")
    models = {"base_model": base, "sft_checkpoint": sft, "reward_model": reward_model}
    for name in options.methods.split(","):
        method, stage = METHODS[name], f"aligned_policy/{name}"
        training = Training(
            models=models,
            folders={n: out / n for n in method.inputs},
            prompt_tags=rules.prompt_tags,
            log=log,
            **places(stage),
        )
        method.train(seeded(recipe, stage, method.config, seed), training)
        done(stage)
        metrics, rows = evaluate_policy(
            recipe.config("policy_report", ReportConfig),
            theirs=measured,
            base_rows=table,
            sft=sft,
            policy=ModelFiles(base.base, out / stage / "model"),
            evaluator=evaluator,
            reward_model=reward_model,
            heldout=heldout,
            log=log,
        )
        result["reports"][name] = metrics
        (out / "metrics.json").write_text(json.dumps(result))  # now, so that a run that is cut off has something to show
        (out / f"generations-{name}.json").write_text(json.dumps(rows, ensure_ascii=False))
        done(f"policy_report/{name}")


def seeded(recipe: Recipe, stage: str, kind: type[Config], seed: int) -> Any:
    """The recipe's configuration of a stage, 100 times `seed` added to each of its seeds."""

    def moved(values: dict[str, Any]) -> dict[str, Any]:
        return {k: moved(v) if isinstance(v, dict) else v + 100 * seed if k == "seed" else v for k, v in values.items()}

    return kind.model_validate(moved(recipe.config(stage, kind).model_dump()))


def _interval(metrics: dict[str, float], key: str) -> str:
    shown = [metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"]]
    return "{:.2f} [{:.2f}, {:.2f}]".format(*shown)


if __name__ == "__main__":
    main()
