"""PPO: memory of one base against four models, and speed beside the last PPO that TRL shipped (1.12, `trl.experimental.ppo`).

    python -m benchmarks.ppo MODEL [--adapter FOLDER | --random-layers N] [--trl FOLDER] [--last-layers N] [--dtype bfloat16]

MODEL is the folder of a causal language model with a chat template, the adapter a checkpoint over it (an SFT checkpoint, whose
answers end by themselves) that is merged first. --random-layers takes random weights instead: a Llama 2048 wide, of 0.1 billion
parameters and 44 million more a layer (22 layers: TinyLlama's shape), whose answers never end. The other folder is one into which
TRL 1.12's wheel was unpacked. Every side is a process of its own with the same base, prompts, batch, length limit, temperature,
PPO epochs and adapters: LoRA r 16 on all linear matrices, with --last-layers on those of the last layers only; for TRL inside
policy, value and reward model. The reward model has a random head. The first step, which includes what is set up once, is not
timed. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTIONS = [
    "What should I check before buying a used bicycle?",
    "Write two sentences about a lighthouse in winter.",
    "How does yeast make bread rise?",
    "Give me a polite way to decline a meeting.",
    "Why is the sky red at sunset?",
    "Name three ways to remember a phone number.",
    "How do I get a stain out of a wool coat?",
    "Explain what a variable is to a child.",
]
SIDES = ("one base", "four models", "four models, all weights trained", "TRL 1.12")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--random-layers", type=int, default=0)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--sides", default="", help="numbers of the sides to run, from 0, separated by commas; default all")
    parser.add_argument("--last-layers", type=int, default=0, help="adapters on the last N layers only, on every side; 0: on all")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--ppo-epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--merged", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        options.model = options.merged
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options, Path(folder))))
        return
    results = {}
    sides = [SIDES[int(i)] for i in options.sides.split(",")] if options.sides else SIDES if options.trl else SIDES[:3]
    with tempfile.TemporaryDirectory() as folder:
        model = str(_start(options, Path(folder) / "start"))
        for side in sides:
            print(f"running: {side}", file=sys.stderr, flush=True)
            arguments = [sys.executable, "-m", "benchmarks.ppo", *sys.argv[1:], "--merged", model, "--side", side]
            done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{side}: failed with exit code {done.returncode}", file=sys.stderr, flush=True)
            else:
                results[side] = json.loads(done.stdout.splitlines()[-1])
    print(table(results, options))


def _start(options: argparse.Namespace, folder: Path) -> Path:
    """The folder of the model that every side starts from."""
    from alignment.models import LoadSettings, ModelFiles, load_causal_lm, load_tokenizer, resolve_dtype, save_model

    tokenizer, load = load_tokenizer(options.model), LoadSettings(dtype="float32")
    if options.random_layers:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
        shape["num_hidden_layers"] = options.random_layers
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=4, tie_word_embeddings=True, **shape, **ids)
        model = LlamaForCausalLM(config)
    elif options.adapter:
        model = load_causal_lm(ModelFiles(options.model, options.adapter), load)
    else:
        return options.model
    save_model(model, tokenizer, folder, resolve_dtype(options.dtype))
    return folder


def table(results: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """The results as Markdown, with both ratios."""
    one = results["one base"]
    layers = f"the last {options.last_layers}" if options.last_layers else "all"
    lines = [
        f"{options.dtype}, {platform.machine()}: {options.batch_size} answers a step of up to {options.new_tokens} tokens, "
        f"{options.micro_batch_size} in memory at once, {options.ppo_epochs} PPO epochs, adapters on {layers} layers, "
        f"{options.steps - 1} steps timed.",
        "",
        "| | peak memory (GB) | one base / this | episodes per second | one base / this | tokens per answer |",
        "|---|---|---|---|---|---|",
    ]
    for side, r in results.items():
        lines.append(
            f"| {side} | {r['peak_gb']:.2f} | {one['peak_gb'] / r['peak_gb']:.2f} | {r['episodes_per_second']:.2f} | "
            f"{one['episodes_per_second'] / r['episodes_per_second']:.2f} | {r['length']:.1f} |"
        )
    return "\n".join(lines)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Peak memory of this process, episodes per second and mean answer length of one side."""
    import torch

    run = _trl if options.side.startswith("TRL") else _ours
    stamps, length = run(options, folder)
    seconds = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gb": peak / 1e9, "episodes_per_second": options.batch_size / seconds, "length": length}


def _ours(options: argparse.Namespace, folder: Path) -> tuple[list[float], float]:
    from alignment.generation import SamplingSettings
    from alignment.methods.ppo import PpoConfig, train_ppo
    from alignment.models import LoadSettings, ModelFiles
    from alignment.progress import Log
    from alignment.rewards import Task

    full = options.side.endswith("trained")
    lora, load = _lora(options), LoadSettings(dtype=options.dtype)
    sft, reward = _adapters(options.model, folder, lora, load)
    if full:
        sft, reward = ModelFiles(options.model), ModelFiles(options.model, reward.adapter)
    stamps: list[float] = []
    config = PpoConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        ppo_epochs=options.ppo_epochs,
        share_base=options.side == "one base",
        finetuning="full" if full else "lora",
        lora=lora,
        load=load,
        sampling=SamplingSettings(temperature=0.7, top_k=0, max_new_tokens=options.new_tokens, batch_size=options.batch_size),
        save_every=1000,
    )
    for name in ("work", "out"):
        (folder / name).mkdir()
    tasks = [Task(({"role": "user", "content": q},)) for q in QUESTIONS * 4]
    log = Log(metrics=lambda step, values: stamps.append(time.monotonic()))
    trained, _ = train_ppo(config, sft, reward, tasks, work=folder / "work", out=folder / "out", log=log)
    return stamps, trained.mean("length/mean")


def _lora(options: argparse.Namespace):
    """The adapters of every side and role."""
    from alignment.models import LoraSettings

    return LoraSettings(dropout=0.0, target_modules=["all-linear"], last_layers=options.last_layers)


def _adapters(model: Path, folder: Path, lora, load):
    """An untrained adapter for the policy and one, with a random head, for the reward model."""
    from peft import get_peft_model

    from alignment.models import ModelFiles, load_causal_lm, load_reward_model, load_tokenizer, lora_config, save_model

    tokenizer = load_tokenizer(model)
    for name, base, task in (
        ("policy", load_causal_lm(ModelFiles(model), load), "CAUSAL_LM"),
        ("reward", load_reward_model(ModelFiles(model), load, tokenizer=tokenizer), "SEQ_CLS"),
    ):
        save_model(get_peft_model(base, lora_config(lora, base, task)), tokenizer, folder / name)
    return ModelFiles(model, folder / "policy"), ModelFiles(model, folder / "reward")


def _trl(options: argparse.Namespace, folder: Path) -> tuple[list[float], float]:
    sys.path.insert(0, str(options.trl))
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from alignment.chat import prompt_ids
    from alignment.models import load_tokenizer, lora_config

    assert trl.__version__.startswith("1.12"), trl.__version__
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.model)
    tokenizer.padding_side = "left"
    dtype = getattr(torch, options.dtype)
    settings = _lora(options)
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)

    def scorer(trainable: bool):
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=dtype)
        model.config.pad_token_id = tokenizer.pad_token_id
        given = lora_config(settings, model, "SEQ_CLS").to_dict() | {"modules_to_save": None, "task_type": None}
        model = inject_adapter_in_model(LoraConfig(**{k: v for k, v in given.items() if k in _LORA_FIELDS}), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trainable and ("lora_" in name or name.startswith("score"))
        return model

    stamps: list[float] = []
    lengths: list[float] = []

    class Stamp(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "objective/kl" in (logs or {}):
                stamps.append(time.monotonic())

    rows = [{"input_ids": prompt_ids(tokenizer, [{"role": "user", "content": q}])} for q in QUESTIONS * 4]
    accumulation = options.batch_size // options.micro_batch_size
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=accumulation,
            num_mini_batches=1,
            num_ppo_epochs=options.ppo_epochs,
            total_episodes=options.steps * options.batch_size,
            local_rollout_forward_batch_size=options.batch_size,
            response_length=options.new_tokens,
            stop_token="eos",
            temperature=0.7,
            missing_eos_penalty=1.0,
            kl_coef=0.1,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=options.dtype == "bfloat16",
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=scorer(False),
        value_model=scorer(True),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora_config(settings, policy, "CAUSAL_LM"),
        callbacks=[Stamp()],
    )
    _note_lengths(trainer, tokenizer, lengths)
    trainer.train()
    return stamps, sum(lengths) / len(lengths)


_LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "bias")


def _note_lengths(trainer, tokenizer, lengths: list[float]) -> None:
    # What the policy generates, counted up to EOS as ours are.
    generate = trainer.policy_model.generate

    def counting(*args, **kwargs):
        out = generate(*args, **kwargs)
        width = kwargs["input_ids"].shape[1]
        for row in out.sequences[:, width:].tolist():
            lengths.append(row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row))
        return out

    trainer.policy_model.generate = counting


if __name__ == "__main__":
    main()
