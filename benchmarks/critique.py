"""The local critic against the document's sequential loop: one prompt at a time, one plain `model.generate` per answer.

    python -m benchmarks.critique MODEL [--adapter FOLDER] [--prompts 24] [--rounds 1] [--repeats 2] [--data data/prompts.jsonl]

MODEL is the folder of a causal language model with a chat template, the adapter a checkpoint over it that is merged first. Both
sides load the same weights in the same dtype, take the same prompts through the same loop (initial answer, then critique and
revision under the same principles), and may use as many new tokens; both decode greedily, so that they write the same texts up
to rounding. They take turns in one process, in alternating order, after a warm-up. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SIDES = ("sequential loop", "local critic")
TOKENS = {"answer": 80, "critique": 40, "revision": 80}  # limits of the demo recipe


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--data", type=Path, default=PROJECT / "data" / "prompts.jsonl")
    parser.add_argument("--constitution", type=Path, default=PROJECT / "conf" / "constitutions" / "general.yaml")
    print(run(parser.parse_args()))


def run(options: argparse.Namespace) -> str:
    """Both sides, in turn; the results as Markdown."""
    import torch

    from alignment.constitutions import load_constitution
    from alignment.critic import LocalAnswerer
    from alignment.models import LoadSettings, ModelFiles, load_causal_lm, load_tokenizer
    from alignment.readers import read_prompts

    rules = load_constitution(options.constitution)
    prompts = [p for p in read_prompts(options.data) if set(p.tags) & set(rules.prompt_tags)][: options.prompts]
    model = load_causal_lm(ModelFiles(options.model, options.adapter), LoadSettings(dtype=options.dtype)).eval()
    tokenizer = load_tokenizer(options.model)
    run_side = {"sequential loop": _sequential, "local critic": _local}
    answerer = LocalAnswerer(model, tokenizer)
    for side in SIDES:
        run_side[side](model, tokenizer, answerer, prompts[:2], rules, options)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    tokens: dict[str, int] = {}
    finals: dict[str, list[str]] = {}
    for repeat in range(options.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            begun = time.monotonic()
            finals[side] = run_side[side](model, tokenizer, answerer, prompts, rules, options)
            seconds[side].append(time.monotonic() - begun)
            tokens[side] = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in finals[side])
    same = sum(a == b for a, b in zip(finals[SIDES[0]], finals[SIDES[1]], strict=True))
    head = (
        f"{len(prompts)} prompts, {options.rounds} round(s), {next(model.parameters()).dtype}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores; each side {options.repeats} times, alternating."
    )
    return table(head, seconds, tokens, len(prompts), same)


def table(head: str, seconds: dict[str, list[float]], tokens: dict[str, int], prompts: int, same: int) -> str:
    """The results as Markdown, with the ratio of the mean times and that of every turn."""
    first, second = SIDES
    ratios = [a / b for a, b in zip(seconds[first], seconds[second], strict=True)]
    lines = [
        head,
        "",
        "| | seconds | prompts per minute | tokens of final answers | times as fast |",
        "|---|---|---|---|---|",
    ]
    for side in SIDES:
        mean = sum(seconds[side]) / len(seconds[side])
        times = sum(seconds[first]) / sum(seconds[side])
        each = ", ".join(f"{s:.1f}" for s in seconds[side])
        lines.append(f"| {side} | {each} | {60 * prompts / mean:.1f} | {tokens[side]} | {times:.2f} |")
    lines += ["", f"Turn by turn: {', '.join(f'{r:.2f}' for r in ratios)}. Final answers equal: {same} of {prompts}."]
    return "\n".join(lines)


def _local(model, tokenizer, answerer, prompts, rules, options) -> list[str]:
    from alignment.critique import CritiqueConfig, critique_and_revise
    from alignment.generation import SamplingSettings

    limits = {
        name: SamplingSettings(temperature=0.0, max_new_tokens=n, batch_size=options.batch_size) for name, n in TOKENS.items()
    }
    config = CritiqueConfig(rounds=options.rounds, no_violation_threshold=1.0, chunk=len(prompts), **limits)
    with tempfile.TemporaryDirectory() as folder:
        revised = critique_and_revise(answerer, answerer, prompts, rules, config, work=Path(folder))
    return [r.final for r in revised]


def _sequential(model, tokenizer, answerer, prompts, rules, options) -> list[str]:
    # The document's constitutional_ai_pipeline, its client's call replaced by generate(); the critic is asked as ours is.
    from alignment.critique import critique_request, draw_principles, revision_request
    from alignment.readers import NO_VIOLATIONS

    barred = tokenizer(NO_VIOLATIONS, add_special_tokens=False)["input_ids"][:1]

    def ask(messages: Sequence[dict[str, str]], limit: int, first: list[int] | None = None) -> str:
        import torch

        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
        )
        with torch.inference_mode():
            out = model.generate(
                **encoded.to(model.device),
                do_sample=False,
                max_new_tokens=limit,
                begin_suppress_tokens=first,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        return tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    finals = []
    for prompt in prompts:
        current = ask([{"role": "user", "content": prompt.prompt}], TOKENS["answer"])
        for principle in draw_principles(rules, options.rounds, prompt.id, 0):
            asked = [{"role": "user", "content": critique_request(prompt.prompt, current, principle.text)}]
            critique = ask(asked, TOKENS["critique"], barred)
            asked += [{"role": "assistant", "content": critique or "-"}, {"role": "user", "content": revision_request()}]
            current = ask(asked, TOKENS["revision"])
        finals.append(current)
    return finals


if __name__ == "__main__":
    main()
