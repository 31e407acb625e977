"""No setting of a method is ignored: each changes the policy that comes out, and each is read somewhere."""

import ast
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

import alignment
from alignment.methods import METHODS, Training
from alignment.models import LoadSettings, LoraSettings
from alignment.progress import SILENT
from alignment.recipes import Recipe
from alignment.records import Conversation, Message, PreferencePair, Prompt
from alignment.reward import RewardConfig
from alignment.training import OptimSettings

# Settings under which every other one matters, and for each of these another value. `finetuning`, `lora`, `load` and `optim`
# are the same in all methods and have tests of their own.
SHARED = {"finetuning", "lora", "load", "optim"}
RL = {
    "tasks": "both",
    "num_generations": 4,
    "max_new_tokens": 4,
    "max_tasks": 8,
    "updates_per_batch": 2,
    "rewards": {"reward_model": 1.0, "exact_answer": 1.0, "answer_format": 0.0},
}
OTHER_RL = {
    "rewards.reward_model": -1.0,
    "rewards.exact_answer": 0.5,
    "rewards.answer_format": 1.0,
    "tasks": "problems",
    "max_tasks": 4,
    "max_prompt_length": 60,
    "num_generations": 2,
    "temperature": 0.5,
    "max_new_tokens": 2,
    "missing_eos_penalty": 1.0,
    "beta": 1.0,
    "updates_per_batch": 1,
    "epsilon": 0.01,
}
PAIRS = {"human_pairs": 2}
OTHER_PAIRS = {"beta": 1.0, "human_pairs": -1, "constitutional_pairs": 1, "max_length": 34}
CASES = {
    "sl_cai": ({"demonstrations": 1}, {"demonstrations": -1, "max_length": 34}),
    "dpo": (
        {**PAIRS, "loss_type": "robust", "label_smoothing": 0.1},
        {**OTHER_PAIRS, "loss_type": "exo_pair", "label_smoothing": 0.3, "sft_weight": 1.0},
    ),
    "kto": (PAIRS, {**OTHER_PAIRS, "desirable_weight": 0.2, "undesirable_weight": 0.2}),
    "orpo": (PAIRS, OTHER_PAIRS),
    "ppo": (
        {
            "steps": 3,
            "seed": 10,  # its few answers earn every reward, repeat a token, and have a KL above 0, so that each setting matters
            "batch_size": 4,
            "mini_batches": 2,
            "ppo_epochs": 2,
            "learning_rate": 3e-3,
            "critic_learning_rate": 3e-3,
            "kl_coef": 1.0,
            "kl_controller": "adaptive",
            "kl_horizon": 2,
            "tasks": "both",
            "rewards": RL["rewards"],
            "sampling": {"temperature": 1.0, "top_k": 0, "max_new_tokens": 2},
            "critic_start": "sft",
            "share_base": False,
        },
        {
            **{
                path: value
                for path, value in OTHER_RL.items()
                if path.startswith("rewards") or path in ("tasks", "max_prompt_length")
            },
            "steps": 2,
            "batch_size": 8,
            "mini_batches": 1,
            "ppo_epochs": 1,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "scheduler": "constant",
            "warmup_ratio": 0.5,
            "max_grad_norm": 0.01,
            "kl_coef": 0.1,
            "kl_controller": "fixed",
            "kl_target": 1e-4,
            "kl_horizon": 1000,
            "kl_estimator": "k3",
            "gamma": 0.5,
            "gae_lambda": 0.1,
            "clip_range": 0.001,
            "clip_range_value": 0.001,
            "whiten_rewards": True,
            "whiten_advantages": False,
            "missing_eos_penalty": 0.0,
            "sampling.temperature": 0.5,
            "sampling.max_new_tokens": 4,
            "critic_start": "reward_model",
            "seed": 1,
        },
    ),
    "grpo": (RL, {**OTHER_RL, "loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": (RL, {path: OTHER_RL[path] for path in ("num_generations", "beta", "updates_per_batch", "epsilon")}),
}
# Settings that a method reads where another one reads them, too, whose cases stand for both: by method, the other and these.
PROVED_BY = {
    "rloo": (
        "grpo",
        {"rewards", "tasks", "max_tasks", "max_prompt_length", "temperature", "max_new_tokens", "missing_eos_penalty"},
    )
}
LAYOUT = {"sample_batch_size", "score_batch_size", "share_base", "reuse_frozen_layers", "micro_batch_size", "save_every"}


@pytest.fixture(scope="module")
def folder(problems, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    pairs = [PreferencePair(id=f"p{i}", prompt=f"Question {i}", chosen=f"{i} yes", rejected="no" + "!" * i) for i in range(4)]
    conversations = [
        Conversation(
            id=f"c{i}", messages=(Message(role="user", content=f"Hi {i}"), Message(role="assistant", content="Hello" + "o" * i))
        )
        for i in range(4)
    ]
    for name, rows in {
        "pairs": pairs,
        "reward_train": [p.model_copy(update={"id": f"h{p.id}", "prompt": f"{p.prompt}?"}) for p in pairs],
        "train": [Prompt(id=f"t{i}", prompt=f"Prompt {i}", tags=("general",)) for i in range(8)],
        "problems_train": problems[:8],
    }.items():
        (data / f"{name}.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows), encoding="utf-8")
    demonstrations = tmp_path_factory.mktemp("demonstrations")
    for name in ("train", "heldout"):
        (demonstrations / f"{name}.jsonl").write_text(
            "".join(r.model_dump_json() + "\n" for r in conversations), encoding="utf-8"
        )
    return lambda asset: demonstrations if asset == "sft_dataset" else data


@pytest.fixture(scope="module")
def policy(four_answers, folder, tmp_path_factory):
    """The folder of what a method makes of the settings; trained once for each."""
    known = {}

    def run(name, settings):
        if repr((name, settings)) not in known:
            method, place = METHODS[name], tmp_path_factory.mktemp(name)
            for sub in ("work", "out"):
                (place / sub).mkdir()
            optim = OptimSettings(
                epochs=2, learning_rate=3e-3, scheduler="constant", warmup_ratio=0.0, batch_size=4, micro_batch_size=4
            )
            optim = {"optim": optim} if "optim" in method.config.model_fields else {}
            config = method.config.model_validate(
                {
                    "load": LoadSettings(dtype="float32"),
                    "lora": LoraSettings(dropout=0.0, target_modules=["all-linear"]),
                    **optim,
                    **settings,
                }
            )
            training = Training(
                models=dict.fromkeys(("sft_checkpoint", "base_model", "reward_model"), four_answers),
                folders={asset: folder(asset) for asset in method.inputs},
                prompt_tags=("general",),
                work=place / "work",
                out=place / "out",
                log=SILENT,
            )
            method.train(config, training)
            known[repr((name, settings))] = place / "out" / "model"
        return known[repr((name, settings))]

    return run


def with_other(settings, path, value):
    first, _, rest = path.partition(".")
    return {**settings, first: {**settings[first], rest: value} if rest else value}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_changed_below(name):
    fields = set(METHODS[name].config.model_fields)
    _, proved = PROVED_BY.get(name, (None, set()))
    assert changed(name) | proved | SHARED & fields == fields - LAYOUT


def changed(name):
    return {path.partition(".")[0] for path in CASES[name][1]}


@pytest.mark.parametrize(("name", "other", "settings"), [(name, *proved) for name, proved in PROVED_BY.items()])
def test_what_another_method_proves_is_read_by_code_that_both_share(name, other, settings):
    assert settings <= changed(other)
    assert METHODS[name].train.__code__ is METHODS[other].train.__code__  # made by one function of the table
    for config in (METHODS[name].config, METHODS[other].config):
        assert settings.isdisjoint(config.__annotations__)  # inherited as they are
        nodes = list(ast.walk(ast.parse(Path(sys.modules[config.__module__].__file__).read_text(encoding="utf-8"))))
        read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        given = {keyword.arg for node in nodes if isinstance(node, ast.Call) for keyword in node.keywords}
        assert settings.isdisjoint(read | given)  # the method's own file neither reads nor replaces them


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, (_, others) in CASES.items() for path in others])
def test_a_setting_changes_the_policy(policy, largest_difference, monkeypatch, name, path):
    # The tiny model never writes `Answer: ...`; so that its weight matters, another property of the answer is rewarded.
    monkeypatch.setattr("alignment.rewards.answer_format", lambda rollouts: [float(len(r.completion)) for r in rollouts])
    settings, others = CASES[name]
    assert largest_difference(policy(name, settings), policy(name, with_other(settings, path, others[path]))) > 1e-5


@pytest.mark.parametrize("config", [RewardConfig, *(method.config for name, method in METHODS.items() if name != "sl_cai")])
def test_dropout_is_refused_where_there_is_none(config):
    with pytest.raises(ValidationError, match=r"lora\n.*dropout must be 0 here, and is 0.1: only SFT and SL-CAI train with"):
        config(lora={"dropout": 0.1})
    recipe = Recipe(Path("recipe.yaml"), {"stage": {"lora": {"r": 4}}})
    assert recipe.config("stage", config).lora.dropout == 0.0  # what a recipe does not name is the stage's own default


@pytest.mark.parametrize("name", METHODS)
def test_the_same_settings_give_the_same_policy(policy, largest_difference, name):
    settings, _ = CASES[name]
    cut = "max_length" if "max_length" in METHODS[name].config.model_fields else "max_prompt_length"
    assert largest_difference(policy(name, settings), policy(name, {**settings, cut: 500})) == 0  # nothing is as long


def test_every_setting_of_a_method_is_read():
    package = Path(alignment.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    by_name = {k.value for node in nodes if isinstance(node, ast.Dict) for k in node.keys if isinstance(k, ast.Constant)}
    for method in METHODS.values():
        config = method.config()
        assert set(method.config.model_fields) <= read
        for nested in (value for _, value in config if hasattr(value, "model_fields")):
            assert set(type(nested).model_fields) <= read | by_name
