"""NF4 (QLoRA) on the CPU, through bitsandbytes: every stage trains an adapter over a base that really is in 4 bit."""

import math

import pytest
import torch
from safetensors.torch import load_file

from alignment.chat import answer_ids
from alignment.errors import UserError
from alignment.generation import SamplingSettings, generate
from alignment.likelihood import label_log_probs
from alignment.methods import METHODS, Training, orpo
from alignment.methods.dpo import DpoConfig, train_dpo
from alignment.methods.orpo import OrpoConfig, train_orpo
from alignment.models import LoadSettings, LoraSettings, ModelFiles, load_causal_lm, load_reward_model, load_tokenizer
from alignment.progress import SILENT
from alignment.records import Conversation, Message, PreferencePair, Problem, Prompt
from alignment.reward import RewardConfig, score_pairs, train_reward_model
from alignment.sft import SftConfig, nats_per_token, train_sft
from alignment.training import OptimSettings, run_trainer
from resources.model_sources import BaseModelConfig, fetch_model, resolve_source

pytest.importorskip("bitsandbytes")

ROWS = [
    Conversation(id=f"c{i}", messages=(Message(role="user", content=f"question {i}"), Message(role="assistant", content=answer)))
    for i in range(8)
    for answer in ("yes please", "no never")
]
PAIRS = [PreferencePair(id=f"p{i}", prompt=f"question {i}", chosen="yes please", rejected="no never") for i in range(16)]
LORA = LoraSettings(target_modules=["all-linear"], dropout=0.0)
OPTIM = OptimSettings(epochs=5, learning_rate=1e-2, batch_size=8, micro_batch_size=8, save_every=4)
# What makes a method's run short, for those of its settings that it has.
SHORT = {
    "optim": OptimSettings(epochs=2, learning_rate=1e-3, batch_size=8, micro_batch_size=8, save_every=2),
    "lora": LORA,
    "steps": 2,
    "batch_size": 8,
    "micro_batch_size": 8,
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "num_generations": 4,
    "max_new_tokens": 8,
    "sampling": SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=8),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def nf4(request):
    """Load settings with a 4-bit base, computing in 32 or in 16 bit."""
    return LoadSettings(dtype=request.param, quantization="nf4")


@pytest.fixture
def multiplications(monkeypatch):
    """Counts the multiplications with 4-bit matrices."""
    import bitsandbytes as bnb

    original, count = bnb.nn.Linear4bit.forward, [0]

    def forward(self, x):
        count[0] += 1
        return original(self, x)

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)
    return count


def folders(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp(name)
    for part in ("work", "out"):
        (folder / part).mkdir()
    return {"work": folder / "work", "out": folder / "out"}


def tolerance(nf4):
    return 1e-4 if nf4.dtype == "float32" else 3e-2


def losses(trained):
    return [loss for _, loss in trained.curves["loss"]]


def only_an_adapter_is_in(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    assert [p.name for p in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora_" in name or "score" in name or "trainable_tokens" in name for name in weights)
    assert all(torch.isfinite(w).all() for w in weights.values())
    return weights


# --- The base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_base_is_in_4_bit_and_close_to_the_original(architecture, tiny_model, tiny_gpt2, nf4, model, float32):
    import bitsandbytes as bnb

    folder = tiny_model if architecture == "llama" else tiny_gpt2
    plain = model if architecture == "llama" else load_causal_lm(ModelFiles(folder), float32)
    quantised = load_causal_lm(ModelFiles(folder), nf4)
    layers = {name: m for name, m in quantised.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == {"llama": 14, "gpt2": 8}[architecture]  # 2 layers of 7 (q, k, v, o, gate, up, down) or 4 matrices
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.compute_dtype == getattr(torch, nf4.dtype)
        original = plain.get_submodule(name).weight
        assert layer.weight.numel() * 2 == original.numel()  # two weights a byte
        restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        original = original.T if architecture == "gpt2" else original  # its Conv1D stores (in, out)
        error = (restored - original).norm() / original.norm()
        assert 0.01 < error < 0.15
    assert quantised.get_output_embeddings().weight.dtype == getattr(torch, nf4.dtype)


def test_all_of_4_bit_weights_cannot_be_trained(tiny_model, tmp_path, nf4):
    for function, config, rows in ((train_sft, SftConfig, ROWS), (train_reward_model, RewardConfig, PAIRS)):
        with pytest.raises(UserError, match=r"load\.quantization: nf4: 4-bit weights cannot be trained.*Remedy.*lora"):
            function(config(finetuning="full", load=nf4), ModelFiles(tiny_model), rows, [], work=tmp_path, out=tmp_path)


# --- Stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(tiny_model, nf4, tmp_path_factory):
    """An SFT adapter trained over the 4-bit base."""
    config = SftConfig(lora=LORA, load=nf4, optim=OPTIM)
    where = folders(tmp_path_factory, "sft")
    before = (tiny_model / "model.safetensors").read_bytes()
    trained, metrics = train_sft(config, ModelFiles(tiny_model), ROWS, ROWS[:4], **where)
    assert (tiny_model / "model.safetensors").read_bytes() == before
    return trained, metrics, ModelFiles(tiny_model, where["out"] / "model")


def test_sft_learns(sft):
    trained, metrics, files = sft
    assert losses(trained)[0] == pytest.approx(math.log(259), abs=0.3)  # it knows nothing yet
    assert losses(trained)[-1] < losses(trained)[0] - 0.5
    assert metrics["heldout/loss"] < metrics["heldout/loss_before"] - 0.5
    assert len(only_an_adapter_is_in(files.adapter)) == 28  # A and B of 14 matrices


def test_loaded_anew_it_is_the_same_and_not_merged(sft, nf4):
    import bitsandbytes as bnb

    _, metrics, files = sft
    model, tokenizer = load_causal_lm(files, nf4), load_tokenizer(files.base)
    assert list(model.peft_config) == ["default"]
    wrapped = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == 14
    assert all(isinstance(m.base_layer, bnb.nn.Linear4bit) and not m.merged for m in wrapped)
    rows = []
    for row in ROWS[:4]:
        before, answer = answer_ids(tokenizer, [row.messages[0].model_dump()], row.messages[1].content)
        rows.append({"input_ids": before + answer, "labels": [-100] * len(before) + answer})
    assert nats_per_token(model, tokenizer, rows, 4) == pytest.approx(metrics["heldout/loss"], abs=tolerance(nf4))


def test_small_steps_are_not_lost(sft, nf4, tmp_path_factory):
    """At learning rates like DPO's a weight moves by less than the distance of two 16-bit numbers."""
    _, _, start = sft
    where = folders(tmp_path_factory, "dpo")
    optim = OptimSettings(epochs=1, learning_rate=1e-6, scheduler="constant", warmup_ratio=0.0, batch_size=16, micro_batch_size=8)
    train_dpo(DpoConfig(load=nf4, optim=optim), start, PAIRS, **where)
    after, before = (only_an_adapter_is_in(folder) for folder in (where["out"] / "model", start.adapter))
    steps = torch.cat([(after[key] - before[key].bfloat16().float()).abs().flatten() for key in after])  # TRL rounds the start
    assert (steps > 0).float().mean() > 0.9
    assert steps.max() < 1e-5


def test_small_steps_of_a_score_head_are_not_lost_either(tiny_model, nf4, tmp_path_factory):
    """Each of 40 steps is less than half the distance of two 16-bit numbers from most weights, all of them are several."""
    where = folders(tmp_path_factory, "reward")
    optim = OptimSettings(
        epochs=40, learning_rate=2e-5, scheduler="constant", warmup_ratio=0.0, batch_size=16, micro_batch_size=16
    )
    train_reward_model(RewardConfig(lora=LORA, load=nf4, optim=optim), ModelFiles(tiny_model), PAIRS, [], **where)
    drawn = load_reward_model(ModelFiles(tiny_model), nf4, tokenizer=load_tokenizer(tiny_model), seed=optim.seed)
    (head,) = (value for name, value in only_an_adapter_is_in(where["out"] / "model").items() if "score" in name)
    assert head.dtype == torch.float32
    steps = (head.float() - drawn.score.weight.bfloat16().float()).abs()
    assert (steps > 2e-4).float().mean() > 0.9
    assert steps.max() < 2e-3


def test_gradients_are_those_of_the_dequantised_weights_also_after_an_evaluation(sft, float32):
    """Some CPUs' fast kernel for inference has no backward pass, and bitsandbytes stays with it once it was used."""
    import bitsandbytes as bnb

    _, _, files = sft
    model = load_causal_lm(files, LoadSettings(dtype="float32", quantization="nf4"), trainable=True)
    dense = load_causal_lm(files, float32, trainable=True)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            dense.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    ids = (torch.arange(40).reshape(2, 20) + 60).to(model.device)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    gradients = []
    for each in (model, dense):
        each.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-7, name


def test_a_reward_model_learns_and_loads(tiny_model, nf4, tmp_path_factory, multiplications):
    config = RewardConfig(lora=LORA, load=nf4, optim=OPTIM)
    where = folders(tmp_path_factory, "reward")
    trained, metrics, table = train_reward_model(config, ModelFiles(tiny_model), PAIRS, PAIRS[:8], **where)
    assert multiplications[0] > 50
    assert losses(trained)[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses(trained)[-1] < 0.3
    assert metrics["heldout/accuracy"] == 1.0
    folder = where["out"] / "model"
    assert any("score" in name for name in only_an_adapter_is_in(folder))
    tokenizer = load_tokenizer(tiny_model)
    again = load_reward_model(ModelFiles(tiny_model, folder), nf4, tokenizer=tokenizer, seed=9)
    chosen, rejected = score_pairs(again, tokenizer, PAIRS[:8], 8)
    scale = max(abs(row["reward_chosen"]) for row in table)
    assert chosen == pytest.approx([row["reward_chosen"] for row in table], abs=scale * tolerance(nf4))
    assert rejected == pytest.approx([row["reward_rejected"] for row in table], abs=scale * tolerance(nf4))


TALK = Conversation(id="c", messages=(Message(role="user", content="Hi"), Message(role="assistant", content="Hello")))


@pytest.fixture(scope="module")
def inputs(tiny_model, tmp_path_factory):
    """Folders of the assets that methods read, and a reward model."""
    root = tmp_path_factory.mktemp("inputs")
    files = {
        "constitutional_preference_pairs/pairs": PAIRS,
        "human_preferences/reward_train": PAIRS,
        "sft_dataset/train": [TALK],
        "sft_dataset/heldout": [TALK],
        "prompts/train": [Prompt(id=f"q{i}", prompt=f"question {i}", tags=("any",)) for i in range(8)],
        "prompts/problems_train": [Problem(id=f"m{i}", prompt=f"{i} + 1?", answer=str(i + 1)) for i in range(8)],
    }
    for name, rows in files.items():
        path = root / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    where = folders(tmp_path_factory, "reward")
    config = RewardConfig(lora=LORA, optim=OPTIM)
    train_reward_model(config, ModelFiles(tiny_model), PAIRS, [], **where)
    return root, ModelFiles(tiny_model, where["out"] / "model")


# These train in 32 bit, too: by one of TRL's trainers, and by our own. The others have no code of their own that could tell a
# 4-bit base in 32 bit from either alone; where a trainer's casts go wrong is 16 bit.
IN_BOTH = ("dpo", "ppo")


@pytest.fixture
def train_over_4_bit(sft, inputs, nf4, tiny_model, tmp_path_factory, multiplications):
    """Trains the SFT adapter by a method and looks at what comes out."""

    def run(name):
        method, (root, reward_model), (_, _, start) = METHODS[name], inputs, sft
        known = method.config.model_fields
        config = method.config(load=nf4, **{key: value for key, value in SHORT.items() if key in known})
        where = folders(tmp_path_factory, name)
        models = {
            "base_model": ModelFiles(tiny_model),
            "sft_checkpoint": start,
            "reward_model": reward_model,
            "human_reward_model": reward_model,
        }
        assets = {asset: root / asset for asset in method.inputs}
        before = [p.read_bytes() for folder in (start.base, start.adapter) for p in sorted(folder.glob("*.safetensors"))]
        trained, metrics = method.train(config, Training(models, assets, ["any"], **where, log=SILENT))
        assert before == [p.read_bytes() for folder in (start.base, start.adapter) for p in sorted(folder.glob("*.safetensors"))]
        assert multiplications[0] > 50
        assert trained.steps >= 2
        assert all(math.isfinite(value) for value in metrics.values())
        folder = where["out"] / "model"
        weights, old = only_an_adapter_is_in(folder), load_file(start.adapter / "adapter_model.safetensors")
        moved = [(weights[key].float() - old[key].float()).abs().max() for key in weights.keys() & old.keys()]
        assert moved
        assert max(moved) > 1e-4
        policy, tokenizer = load_causal_lm(ModelFiles(tiny_model, folder), nf4), load_tokenizer(tiny_model)
        assert policy.peft_config
        question = [{"role": "user", "content": "question 1"}]
        assert generate(policy, tokenizer, [question], SamplingSettings(temperature=0, max_new_tokens=4))[0].tokens > 0

    return run


@pytest.mark.parametrize("name", IN_BOTH)
def test_a_method_trains_the_sft_adapter_over_the_4_bit_base(train_over_4_bit, name):
    train_over_4_bit(name)


@pytest.mark.parametrize("nf4", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in IN_BOTH])
def test_every_other_method_does_so_in_16_bit(train_over_4_bit, name):
    train_over_4_bit(name)


@pytest.mark.parametrize("critic_start", ["sft", "reward_model"])
def test_ppo_with_a_model_for_each_role_trains_new_adapters_over_full_4_bit_models(
    critic_start, inputs, nf4, tiny_model, tmp_path_factory
):
    known = METHODS["ppo"].config.model_fields
    short = {key: value for key, value in SHORT.items() if key in known}
    config = METHODS["ppo"].config(load=nf4, share_base=False, critic_start=critic_start, **short)
    (root, reward_model), where = inputs, folders(tmp_path_factory, "ppo")
    full = ModelFiles(tiny_model)
    models = {"base_model": full, "sft_checkpoint": full, "reward_model": reward_model, "human_reward_model": reward_model}
    assets = {asset: root / asset for asset in METHODS["ppo"].inputs}
    trained, _ = METHODS["ppo"].train(config, Training(models, assets, ["any"], **where, log=SILENT))
    assert trained.steps == 2
    only_an_adapter_is_in(where["out"] / "model")


def test_orpo_leaves_what_is_frozen_in_the_bases_precision(tiny_model, nf4, tmp_path_factory, monkeypatch):
    """TRL's trainer casts norms, embeddings and head to float32, and with them the states between the layers."""
    frozen = {}

    def run(trainer, *args):
        frozen.update({name: p.dtype for name, p in trainer.model.named_parameters() if not p.requires_grad})
        return run_trainer(trainer, *args)

    monkeypatch.setattr(orpo, "run_trainer", run)
    config = OrpoConfig(load=nf4, lora=LORA, optim=SHORT["optim"])
    train_orpo(config, ModelFiles(tiny_model), PAIRS, **folders(tmp_path_factory, "orpo"))
    assert {dtype for dtype in frozen.values() if dtype != torch.uint8} == {getattr(torch, nf4.dtype)}
    assert torch.uint8 in frozen.values()


def test_dpo_learns_the_pairs(sft, nf4, tmp_path_factory):
    _, _, start = sft
    where = folders(tmp_path_factory, "dpo")
    optim = OptimSettings(epochs=6, learning_rate=1e-3, batch_size=8, micro_batch_size=8)
    trained, metrics = train_dpo(DpoConfig(load=nf4, optim=optim), start, PAIRS, **where)
    assert losses(trained)[0] == pytest.approx(math.log(2), abs=1e-4 if nf4.dtype == "float32" else 0.02)
    assert losses(trained)[-1] < 0.6
    assert metrics["train/rewards_accuracy_last"] == 1.0
    tokenizer = load_tokenizer(start.base)

    def preference(adapter):
        model = load_causal_lm(ModelFiles(start.base, adapter), nf4)
        sides = {}
        for side in ("chosen", "rejected"):
            rows = []
            for pair in PAIRS:
                before, answer = answer_ids(tokenizer, pair.prompt_messages, getattr(pair, side))
                rows.append((before + answer, [-100] * len(before) + answer))
            sides[side] = sum(label_log_probs(model, tokenizer, rows, 8)) / len(rows)
        return sides["chosen"] - sides["rejected"]

    gained = preference(where["out"] / "model") - preference(start.adapter)
    assert 0.1 * gained == pytest.approx(metrics["train/rewards_margin_last"], rel=0.3)  # beta 0.1; measured a step earlier


def test_added_tokens_of_a_conv1d_model_are_trained_over_4_bit_too(tiny_gpt2, nf4, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    template = tmp_path_factory.mktemp("template") / "t.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokens = ["<|user|>", "<|assistant|>"]
    base = BaseModelConfig(source="local", name=str(tiny_gpt2), chat_template=str(template), added_tokens=tokens)
    fetch_model(base, resolve_source(base), folder, SILENT)
    where = folders(tmp_path_factory, "sft")
    trained, metrics = train_sft(SftConfig(lora=LORA, load=nf4, optim=OPTIM), ModelFiles(folder), ROWS, ROWS[:2], **where)
    assert losses(trained)[-1] < losses(trained)[0] - 0.3
    weights = only_an_adapter_is_in(where["out"] / "model")
    (rows,) = (value for name, value in weights.items() if "trainable_tokens" in name)
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    model, tokenizer = load_causal_lm(ModelFiles(folder, where["out"] / "model"), nf4), load_tokenizer(folder)
    held = []
    for row in ROWS[:2]:
        before, answer = answer_ids(tokenizer, [row.messages[0].model_dump()], row.messages[1].content)
        held.append({"input_ids": before + answer, "labels": [-100] * len(before) + answer})
    assert nats_per_token(model, tokenizer, held, 2) == pytest.approx(metrics["heldout/loss"], abs=tolerance(nf4))
