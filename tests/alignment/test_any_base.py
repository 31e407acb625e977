"""A base model without chat template, pad token or turn tokens, as GPT-2 is, goes through every stage with a template supplied.

The bare models here are a small GPT-2 and a small Llama, trained for a second on loose phrases; their tokenizer knows bytes and
`<|endoftext|>`, which is BOS and EOS at once. The Llama does not tie its vocabulary head to its embeddings.
"""

import functools
import json
import math
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from alignment.added_tokens import rows_for_another_adapter
from alignment.chat import TemplateError, answer_ids, conversation_ids, prompt_ids, training_example
from alignment.errors import UserError
from alignment.generation import SamplingSettings, generate
from alignment.likelihood import label_log_probs
from alignment.methods.dpo import DpoConfig, train_dpo
from alignment.methods.ppo import PpoConfig, train_ppo
from alignment.models import (
    LoadSettings,
    LoraSettings,
    ModelFiles,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    lora_config,
)
from alignment.progress import Log
from alignment.records import Conversation, Message, PreferencePair
from alignment.reward import RewardConfig, score, train_reward_model
from alignment.rewards import Task
from alignment.sft import SftConfig, train_sft
from alignment.training import OptimSettings
from resources.model_sources import BaseModelConfig, ModelSourceError, ResolvedSource, fetch_model, resolve_source

POSITIONS = 160
CONVERSATIONS = [
    Conversation(
        id=f"c{i}",
        messages=(Message(role="user", content=f"question {i}"), Message(role="assistant", content="a1!")),
    )
    for i in range(12)
]
PAIRS = [PreferencePair(id=f"p{i}", prompt=f"question {i}", chosen="yes please", rejected="no never") for i in range(16)]


def bare_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """Folders of models as they are on the Hub: no chat template, no pad token."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = bare_tokenizer()
    assert tokenizer.pad_token is None
    ends = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=POSITIONS, **ends))
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **ends)
    )
    assert not llama.config.tie_word_embeddings
    folders = {}
    for name, model in (("gpt2", gpt2), ("llama", llama)):
        pretrain(model, tokenizer)
        folders[name] = tmp_path_factory.mktemp("bare") / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def pretrain(model, tokenizer, steps=150):
    """Plain language modelling on loose phrases, without any turns: an adapter over random weights learns next to nothing."""
    rng = random.Random(0)
    phrases = [f"question {i}" for i in range(16)] + [f"a{i}{end}" for i in range(4) for end in ("", "!", "!!")]
    phrases += ["yes please", "no never", "user", "assistant", "### ", "User:", "Assistant:", "\n", "<|endoftext|>"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        texts = ["".join(rng.choices(phrases, k=24)) for _ in range(8)]
        ids = torch.tensor([tokenizer(text)["input_ids"][:72] for text in texts])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def resolve(source, folder, **settings):
    config = BaseModelConfig(source="local", name=str(source), **settings)
    metrics = fetch_model(config, resolve_source(config), folder, Log())
    return folder, metrics


BASES = {"gpt2-chatml": ("gpt2", "chatml"), "gpt2-plain": ("gpt2", "plain"), "llama-chatml": ("llama", "chatml")}


@pytest.fixture(scope="session", params=BASES)
def base(request, bare, tmp_path_factory):
    """A bare model, resolved with a shipped template: its name and folder."""
    architecture, template = BASES[request.param]
    folder, _ = resolve(bare[architecture], tmp_path_factory.mktemp("base") / request.param, chat_template=template)
    return request.param, folder


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def embeddings(folder):
    weights = load_file(folder / "model.safetensors")
    return [weights[key] for key in ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight") if key in weights]


# --- Resolving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_chatml_adds_its_tokens_with_the_mean_embedding(bare, tmp_path, architecture):
    folder, metrics = resolve(bare[architecture], tmp_path / "out", chat_template="chatml")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [257, 258]
    assert metrics["tokens_added"] == 2
    for name in ("config.json", "generation_config.json"):
        assert (config_of(folder, name)["eos_token_id"], config_of(folder, name)["pad_token_id"]) == (258, 256)
    assert config_of(folder)["vocab_size"] == 259
    for before, after in zip(embeddings(bare[architecture]), embeddings(folder), strict=True):
        assert torch.equal(after[:257], before)
        assert torch.allclose(after[257:], before.mean(dim=0).expand(2, -1), atol=1e-6)


def test_plain_adds_nothing_but_a_pad_token(bare, tmp_path):
    folder, metrics = resolve(bare["gpt2"], tmp_path / "out", chat_template="plain")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, metrics["tokens_added"]) == ("<|endoftext|>", "<|pad|>", 1)
    assert "untrained_token_ids" not in config_of(folder)  # nobody needs to learn to pad


def test_a_model_with_its_own_template_keeps_it_and_its_weights_byte_for_byte(tiny_model, tmp_path):
    folder, metrics = resolve(tiny_model, tmp_path / "out")
    assert metrics["tokens_added"] == 0
    for name in ("chat_template.jinja", "model.safetensors"):
        assert (folder / name).read_bytes() == (tiny_model / name).read_bytes()
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(tiny_model).get_vocab()


def test_chatml_over_a_model_that_has_its_tokens_adds_none(tiny_model, tmp_path):
    folder, metrics = resolve(tiny_model, tmp_path / "out", chat_template="chatml")
    assert metrics["tokens_added"] == 0
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_a_cache_whose_weights_are_linked_is_not_written_to(bare, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(bare["gpt2"], cache)
    before = (cache / "model.safetensors").read_bytes()

    def link(folder, log):
        shutil.copytree(cache, folder, copy_function=os.link)

    fetch_model(BaseModelConfig(chat_template="chatml"), ResolvedSource("cached", link), tmp_path / "out", Log())
    assert (cache / "model.safetensors").read_bytes() == before


def test_a_template_of_ones_own_names_its_tokens(bare, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|stop|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    settings = {"chat_template": str(template), "added_tokens": ["<|user|>", "<|assistant|>", "<|stop|>", "<|fill|>"]}
    folder, metrics = resolve(bare["gpt2"], tmp_path / "out", **settings, eos_token="<|stop|>", pad_token="<|fill|>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, metrics["tokens_added"]) == ("<|stop|>", "<|fill|>", 4)
    assert config_of(folder)["untrained_token_ids"] == [257, 258, 259]  # the pad token is never read
    assert prompt_ids(tokenizer, [{"role": "user", "content": "A"}]) == [257, tokenizer.convert_tokens_to_ids("A"), 259, 258]
    with pytest.raises(TemplateError, match=r"does not end an assistant turn with EOS.*Remedy.*base_model\.eos_token"):
        resolve(bare["gpt2"], tmp_path / "no_end", **settings)
    with pytest.raises(ModelSourceError, match=r"base_model\.eos_token: '<\|no\|>' is not in .*Remedy.*added_tokens"):
        resolve(bare["gpt2"], tmp_path / "unknown", **settings, eos_token="<|no|>")
    template.write_text("{% for m in messages %}")
    with pytest.raises(TemplateError, match=r"base_model\.chat_template: .*mine\.jinja: .* cannot render .*Remedy"):
        resolve(bare["gpt2"], tmp_path / "broken", **settings, eos_token="<|stop|>")


def test_without_a_template_the_shipped_ones_are_named(bare, tmp_path):
    with pytest.raises(UserError, match=r"set base_model\.pad_token"):
        resolve(bare["gpt2"], tmp_path / "no_pad")
    with pytest.raises(UserError, match=r"no chat template\. Remedy: .*base_model\.chat_template: chatml, plain"):
        resolve(bare["gpt2"], tmp_path / "out", pad_token="!")
    with pytest.raises(ModelSourceError, match="or name one of chatml, plain"):
        resolve(bare["gpt2"], tmp_path / "wrong", chat_template="chatlm")


def test_template_and_tokens_are_part_of_the_models_identity(bare):
    def identity(**settings):
        return resolve_source(BaseModelConfig(source="local", name=str(bare["gpt2"]), **settings)).identity

    plain = {"chat_template": "plain"}
    changed = [{}, {"chat_template": "chatml"}, plain, plain | {"added_tokens": ["<|x|>"]}, plain | {"eos_token": "!"}]
    assert len({identity(**settings) for settings in changed}) == 5
    assert "+" not in identity()


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_shipped_templates_append_only_whatever_the_texts_are(template, bare, tmp_path):
    """With a tokenizer that melts line breaks together, as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    source = tmp_path / "source"
    shutil.copytree(bare["gpt2"], source)
    merging = Tokenizer(models.BPE())
    merging.pre_tokenizer, merging.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    merging.train_from_iterator(["a\n\n\n\nb:\n\n\n", "  c   d  "] * 9, trainer)
    assert len(merging.encode("\n\n").ids) == 1
    fast = PreTrainedTokenizerFast(tokenizer_object=merging)
    fast.add_special_tokens({"eos_token": "<|endoftext|>"})
    fast.save_pretrained(source)
    size_to(source, len(fast))
    folder, _ = resolve(source, tmp_path / "out", chat_template=template)
    tokenizer = load_tokenizer(folder)
    for text in ("plain", "\n\nfirst", "last\n\n\n", "  around  ", "", "<|im_end|>\n<|endoftext|>", "### Assistant:\n\nno"):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        before, answer = answer_ids(tokenizer, turns, text)
        assert before == prompt_ids(tokenizer, turns)
        assert answer[-1] == tokenizer.eos_token_id
        assert answer.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(answer[:-1]).replace("\u200b", "") == text.strip()
        example = training_example(tokenizer, [*turns, {"role": "assistant", "content": text}])
        assert [label for label in example.labels if label != -100] == answer


def size_to(folder, vocabulary):
    """Write anew with a vocabulary of another size."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(vocabulary)
    model.save_pretrained(folder)


# --- Every stage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stage(float32, tmp_path_factory):
    """Runs a training function in a folder of its own or, to resume, in a given one; returns curves, metrics and model folder."""

    def run(function, config, *inputs, folder=None, log=None):
        folder = folder or tmp_path_factory.mktemp("stage")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        trained, metrics, *_ = function(
            config, *inputs, work=folder / "work", out=folder / "out", **({"log": log} if log else {})
        )
        return trained, metrics, folder / "out" / "model"

    return run


def optim(**changes):
    return OptimSettings(
        **{"epochs": 1, "learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 4, "save_every": 2} | changes
    )


ALL = LoraSettings(target_modules=["all-linear"], dropout=0.0)


def sft_config(float32, finetuning="lora", max_length=POSITIONS, **changes):
    return SftConfig(finetuning=finetuning, lora=ALL, load=float32, optim=optim(**changes), max_length=max_length)


@pytest.fixture(scope="session")
def sft(base, stage, float32):
    """An SFT adapter that answers every question in one way and then stops."""
    config = sft_config(float32, epochs=25, batch_size=6, micro_batch_size=6)
    trained, _, folder = stage(train_sft, config, ModelFiles(base[1]), CONVERSATIONS, [])
    return trained, ModelFiles(base[1], folder)


def test_sft_learns_to_answer_and_to_stop(base, sft, float32):
    trained, files = sft
    assert trained.curves["loss"][0][1] > 1.5
    assert trained.last("loss") < 0.5
    questions = [[c.messages[0].model_dump()] for c in CONVERSATIONS]
    model, tokenizer = load_causal_lm(files, float32), load_tokenizer(files.base)
    answers = generate(model, tokenizer, questions, SamplingSettings(temperature=0, max_new_tokens=12))
    assert all(a.ended for a in answers)
    assert {a.text for a in answers} == {"a1!"}
    bare_model = load_causal_lm(ModelFiles(files.base), float32)
    assert not any(
        a.ended for a in generate(bare_model, tokenizer, questions, SamplingSettings(temperature=0, max_new_tokens=12))
    )


def test_the_adapter_holds_rows_of_added_tokens_and_of_no_others(base, sft):
    name, _ = base
    weights = load_file(sft[1].adapter / "adapter_model.safetensors")
    rows = {key: value for key, value in weights.items() if "trainable_tokens" in key}
    expected = {"gpt2-chatml": 1, "gpt2-plain": 0, "llama-chatml": 2}[name]  # tied: one matrix; untied: two
    assert len(rows) == expected
    for value in rows.values():
        assert value.shape == (2, 64)
        assert (value[0] - value[1]).norm() > 0.1 * value.norm()  # they began as one and the same
    assert sum(value.numel() for value in weights.values()) < 70_000  # and no whole vocabulary matrix


def log_probs(model, tokenizer, side):
    rows = []
    for pair in PAIRS:
        before, answer = answer_ids(tokenizer, pair.prompt_messages, getattr(pair, side))
        rows.append((before + answer, [-100] * len(before) + answer))
    return torch.tensor(label_log_probs(model, tokenizer, rows, 4))


def test_merging_the_adapter_changes_nothing(sft, float32):
    _, files = sft
    tokenizer = load_tokenizer(files.base)
    merged = load_causal_lm(files, float32)
    beside = load_causal_lm(files, float32, trainable=True)
    assert not hasattr(merged, "peft_config")
    assert hasattr(beside, "peft_config")
    for side in ("chosen", "rejected"):
        assert torch.allclose(log_probs(merged, tokenizer, side), log_probs(beside, tokenizer, side), atol=1e-3)


@pytest.fixture(scope="session")
def dpo(sft, stage, float32):
    """The SFT adapter, trained on pairs."""
    config = DpoConfig(load=float32, optim=optim(epochs=4, learning_rate=1e-3), max_length=POSITIONS)
    return stage(train_dpo, config, sft[1], PAIRS)


def test_dpo_starts_at_its_reference_and_learns_the_pairs(dpo, sft, float32):
    trained, metrics, folder = dpo
    assert trained.curves["loss"][0][1] == pytest.approx(math.log(2), abs=1e-4)  # the reference has the same rows
    assert trained.last("loss") < 0.5
    assert metrics["train/rewards_accuracy_last"] == 1.0
    tokenizer = load_tokenizer(sft[1].base)
    before, after = (load_causal_lm(ModelFiles(sft[1].base, adapter), float32) for adapter in (sft[1].adapter, folder))
    gain = [(log_probs(m, tokenizer, "chosen") - log_probs(m, tokenizer, "rejected")).mean().item() for m in (before, after)]
    assert gain[1] > gain[0] + 2


@pytest.fixture(scope="session")
def scorer(base, stage, float32):
    """A reward model over the base, and its metrics on pairs that it was trained on."""
    config = RewardConfig(lora=ALL, load=float32, optim=optim(epochs=6), max_length=POSITIONS)
    _, metrics, folder = stage(train_reward_model, config, ModelFiles(base[1]), PAIRS, PAIRS[:8])
    return metrics, ModelFiles(base[1], folder)


@pytest.fixture(scope="session")
def ppo(sft, scorer, stage, float32):
    """By the start of the critic: what PPO is called with, and what comes of it undisturbed; trained once."""

    @functools.cache
    def run(critic_start):
        config = PpoConfig(
            load=float32,
            steps=3,
            batch_size=8,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            critic_start=critic_start,
            sampling=SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=8),
            save_every=1,
        )
        arguments = (config, sft[1], scorer[1], [Task((c.messages[0].model_dump(),)) for c in CONVERSATIONS])
        return arguments, *stage(train_ppo, *arguments)

    return run


@pytest.mark.parametrize("critic_start", ["reward_model", "sft"])
def test_ppo_starts_at_its_reference_and_trains(ppo, critic_start):
    _, trained, metrics, _ = ppo(critic_start)
    assert metrics["train/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert trained.curves["objective/kl"][0][1] == pytest.approx(0, abs=1e-5)
    assert trained.curves["objective/kl"][-1][1] != 0


# Bases with added tokens, in matrices that are tied and that are not, each with another start of the critic; kills of PPO over a
# base without them are in `test_ppo.py`.
KILLED = {"gpt2-chatml": "reward_model", "llama-chatml": "sft"}


@pytest.mark.parametrize("base", KILLED, indirect=True)
def test_a_killed_ppo_ends_like_one_that_was_not(base, ppo, stage, recording_steps, tmp_path):
    arguments, calm, _, _ = ppo(KILLED[base[0]])
    with pytest.raises(Killed):
        stage(train_ppo, *arguments, folder=tmp_path, log=recording_steps)
    resumed, _, _ = stage(train_ppo, *arguments, folder=tmp_path)
    for name in ("objective/scores", "objective/kl", "loss/value"):
        for (_, ours), (_, theirs) in zip(resumed.curves[name], calm.curves[name], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def recording_steps():
    """A log that dies at the second step."""

    def metrics(step, values):
        if step == 2:
            raise Killed

    return Log(metrics=metrics)


def test_the_policy_loads_without_this_library(dpo, sft, float32):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, folder = sft[1].base, dpo[2]
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "question 1"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = policy.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    ours = load_causal_lm(ModelFiles(base, folder), float32)
    (expected,) = generate(ours, tokenizer, [question], SamplingSettings(temperature=0, max_new_tokens=16))
    assert tokenizer.decode(reply, skip_special_tokens=True).strip() == expected.text
    assert (tokenizer.eos_token_id in reply) == expected.ended


def test_a_reward_model_over_the_base_learns_and_loads(scorer, float32):
    metrics, files = scorer
    assert metrics["heldout/accuracy"] == 1.0
    tokenizer = load_tokenizer(files.base)
    model = load_reward_model(files, float32, tokenizer=tokenizer, seed=9)
    texts = [[*p.prompt_messages, {"role": "assistant", "content": a}] for p in PAIRS[:8] for a in (p.chosen, p.rejected)]
    scores = score(model, tokenizer, texts, 16)
    assert sum(c - r for c, r in zip(scores[::2], scores[1::2], strict=True)) / 8 == pytest.approx(
        metrics["heldout/margin"], abs=1e-4
    )
    assert score(model, tokenizer, texts, 3) == pytest.approx(scores, abs=1e-4)  # padding is not read


def test_the_adapters_of_a_reward_model_and_of_a_policy_share_one_base(scorer, sft, float32):
    """As in PPO; peft wants rows of the same matrices in both, and the reward model's has none for the vocabulary head."""
    from peft import LoraConfig, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    _, files = scorer
    tokenizer = load_tokenizer(files.base)
    alone = load_reward_model(files, float32, tokenizer=tokenizer)
    shared = load_causal_lm(sft[1], float32, trainable=True)
    before = log_probs(shared, tokenizer, "chosen")
    config, weights = LoraConfig.from_pretrained(files.adapter), load_peft_weights(files.adapter, device="cpu")
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    weights = {name: value for name, value in weights.items() if "score" not in name}
    rows_for_another_adapter(shared, config, weights)
    shared.add_adapter("reward", config)
    assert not set_peft_model_state_dict(shared, weights, adapter_name="reward").unexpected_keys
    shared.set_adapter("reward", inference_mode=True)
    ids = torch.tensor([conversation_ids(tokenizer, [*PAIRS[0].prompt_messages, {"role": "assistant", "content": "yes"}])])
    with torch.no_grad():
        backbones = [getattr(m, m.base_model_prefix) for m in (shared.get_base_model(), alone.get_base_model())]
        ours, theirs = (backbone.eval()(ids)[0] for backbone in backbones)
    assert torch.allclose(ours, theirs, atol=1e-5)
    shared.set_adapter("default")
    assert torch.allclose(log_probs(shared, tokenizer, "chosen"), before, atol=1e-5)


@pytest.fixture(scope="module")
def undisturbed(bare, stage, float32, tmp_path_factory):
    """SFT of a bare GPT-2 and DPO after it: for each the function and what it is called with, and the model that comes of it."""
    folder, _ = resolve(bare["gpt2"], tmp_path_factory.mktemp("base") / "gpt2", chat_template="chatml")
    inputs = (train_sft, sft_config(float32, epochs=2), ModelFiles(folder), CONVERSATIONS, [])
    sft = stage(*inputs)[2]
    config = DpoConfig(load=float32, optim=optim(epochs=2, learning_rate=1e-3), max_length=POSITIONS)
    after = (train_dpo, config, ModelFiles(folder, sft), PAIRS[:12])
    return {"sft": (inputs, sft), "dpo": (after, stage(*after)[2])}


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_killed_training_ends_like_one_that_was_not(
    undisturbed, stage, recording_log, interrupted, largest_difference, tmp_path, name, stop
):
    inputs, calm = undisturbed[name]
    with pytest.raises(interrupted):
        stage(*inputs, folder=tmp_path, log=recording_log(until=stop)[0])
    _, _, resumed = stage(*inputs, folder=tmp_path)
    assert largest_difference(calm, resumed) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_in_16_bit_added_tokens_are_trained_in_32(bare, stage, tmp_path, architecture):
    base, _ = resolve(bare[architecture], tmp_path / "base", chat_template="chatml")
    half = LoadSettings(dtype="bfloat16")
    before, _, sft = stage(train_sft, sft_config(half, epochs=8), ModelFiles(base), CONVERSATIONS, CONVERSATIONS[:2])
    assert before.last("loss") < 0.6 * before.curves["loss"][0][1]
    rows = [w for name, w in load_file(sft / "adapter_model.safetensors").items() if "trainable_tokens" in name]
    assert {row.dtype for row in rows} == {torch.float32}
    config = DpoConfig(load=half, optim=optim(epochs=4, learning_rate=1e-3), max_length=POSITIONS)
    trained, _, _ = stage(train_dpo, config, ModelFiles(base, sft), PAIRS)
    assert trained.curves["loss"][0][1] == pytest.approx(math.log(2), abs=0.01)
    assert trained.last("loss") < 0.6
    reward = RewardConfig(lora=ALL, load=half, optim=optim(epochs=6), max_length=POSITIONS)
    _, metrics, _ = stage(train_reward_model, reward, ModelFiles(base), PAIRS, PAIRS[:8])
    assert metrics["heldout/accuracy"] == 1.0


def test_training_all_weights_trains_the_added_tokens_and_says_so(bare, stage, float32, tmp_path):
    base, _ = resolve(bare["llama"], tmp_path / "base", chat_template="chatml")
    assert config_of(base)["untrained_token_ids"] == [257, 258]
    _, _, full = stage(train_sft, sft_config(float32, finetuning="full", learning_rate=1e-3), ModelFiles(base), CONVERSATIONS, [])
    assert "untrained_token_ids" not in config_of(full)
    assert all((after[257] - after[258]).abs().max() > 1e-4 for after in embeddings(full))
    config = DpoConfig(load=float32, optim=optim(), max_length=POSITIONS)
    trained, _, policy = stage(train_dpo, config, ModelFiles(full), PAIRS)
    assert trained.curves["loss"][0][1] == pytest.approx(math.log(2), abs=1e-4)
    assert not [key for key in load_file(policy / "adapter_model.safetensors") if "trainable_tokens" in key]


def test_tokens_cannot_join_a_head_with_a_bias(bare, tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    source = tmp_path / "phi"
    shutil.copytree(bare["gpt2"], source)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=257, bos_token_id=256, eos_token_id=256, **size)).save_pretrained(source)
    with pytest.raises(UserError, match=r"base_model\.chat_template: .*\(phi\), whose vocabulary head has a bias.*Remedy.*plain"):
        resolve(source, tmp_path / "out", chat_template="chatml")
    folder, _ = resolve(source, tmp_path / "plain", chat_template="plain")
    assert load_tokenizer(folder).pad_token == "<|pad|>"


# --- Which layers an adapter has --------------------------------------------------------------------------------------


def adapted(folder, float32, **settings):
    from peft import get_peft_model

    model = load_causal_lm(ModelFiles(folder), float32)
    config = lora_config(LoraSettings(**settings), model, "CAUSAL_LM")
    names = {name for name, module in get_peft_model(model, config).named_modules() if hasattr(module, "lora_A")}
    return {name.split("base_model.model.", 1)[1] for name in names}


def test_the_default_is_the_documents_where_the_model_has_it_and_attention_elsewhere(tiny_model, tiny_gpt2, float32):
    llama, gpt2 = (adapted(folder, float32) for folder in (tiny_model, tiny_gpt2))
    assert llama == {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"}
    assert gpt2 == {f"transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")}  # not the MLP's c_proj


def test_attention_all_linear_and_last_layers(tiny_model, tiny_gpt2, float32):
    attention = adapted(tiny_model, float32, target_modules=["attention"])
    assert attention == {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"}
    assert len(adapted(tiny_model, float32, target_modules=["all-linear"])) == 14
    assert len(adapted(tiny_gpt2, float32, target_modules=["all-linear"])) == 8
    assert adapted(tiny_gpt2, float32, last_layers=1) == {f"transformer.h.1.attn.{name}" for name in ("c_attn", "c_proj")}


def test_a_second_adapter_has_the_layers_of_the_first(tiny_gpt2, float32):
    from peft import get_peft_model

    model = load_causal_lm(ModelFiles(tiny_gpt2), float32)
    for wanted in (["auto"], ["all-linear"], ["c_fc"]):
        first = lora_config(LoraSettings(target_modules=wanted), model, "CAUSAL_LM")
        wrapped = get_peft_model(load_causal_lm(ModelFiles(tiny_gpt2), float32), first)
        second = lora_config(LoraSettings(target_modules=wanted), wrapped.get_base_model(), "CAUSAL_LM")
        assert second.target_modules == first.target_modules


def test_a_layer_that_is_not_there_is_an_error_that_names_those_that_are(bare, stage, float32, tmp_path):
    base, _ = resolve(bare["gpt2"], tmp_path / "base", chat_template="plain")
    config = sft_config(float32).model_copy(update={"lora": LoraSettings(target_modules=["q_proj", "c_attn", "v_proj"])})
    with pytest.raises(UserError) as error:
        stage(train_sft, config, ModelFiles(base), CONVERSATIONS, [])
    assert "lora.target_modules: this model (gpt2) has no layer named q_proj, v_proj. Remedy" in str(error.value)
    assert "its linear layers, c_attn, c_fc, c_proj, or set" in str(error.value)


# --- How much a model can read ----------------------------------------------------------------------------------------


def test_more_tokens_than_positions_are_refused_before_they_crash(bare, stage, float32, tmp_path):
    base, _ = resolve(bare["gpt2"], tmp_path / "base", chat_template="plain")
    files, too_long = ModelFiles(base), r"161 tokens, and this model \(gpt2\) reads 160 at most.*Remedy"
    longer = {"load": float32, "optim": optim(), "max_length": POSITIONS + 1}
    for function, config, *inputs in (
        (train_sft, SftConfig(lora=ALL, **longer), files, CONVERSATIONS, []),
        (train_reward_model, RewardConfig(lora=ALL, **longer), files, PAIRS, []),
        (train_dpo, DpoConfig(lora=ALL, **longer), files, PAIRS),
    ):
        with pytest.raises(UserError, match=f"max_length: {too_long}"):
            stage(function, config, *inputs)
    model, tokenizer = load_causal_lm(files, float32), load_tokenizer(base)
    question = [{"role": "user", "content": "q"}]
    room = POSITIONS - len(prompt_ids(tokenizer, question))
    generate(model, tokenizer, [question], SamplingSettings(temperature=0, max_new_tokens=room))
    with pytest.raises(UserError, match=f"the longest prompt and max_new_tokens: {too_long}: lower max_new_tokens"):
        generate(model, tokenizer, [question], SamplingSettings(temperature=0, max_new_tokens=room + 1))
    ids = [5] * (POSITIONS + 1)
    with pytest.raises(UserError, match=too_long):
        label_log_probs(model, tokenizer, [(ids, ids)], 1)


def test_a_held_out_pair_that_the_model_cannot_read_is_left_out_and_counted(bare, stage, float32, tmp_path):
    base, _ = resolve(bare["gpt2"], tmp_path / "base", chat_template="plain")
    config = RewardConfig(lora=ALL, load=float32, optim=optim(), max_length=POSITIONS)
    endless = PAIRS[0].model_copy(update={"rejected": "no " * POSITIONS})
    _, metrics, _ = stage(train_reward_model, config, ModelFiles(base), PAIRS, [endless, *PAIRS[:4]])
    assert (metrics["heldout/pairs"], metrics["heldout/pairs_dropped_too_long"]) == (4, 1)


def test_computed_positions_have_no_end(tiny_model, model, tokenizer):
    assert model.config.max_position_embeddings == 4096
    ids = conversation_ids(tokenizer, [{"role": "user", "content": "q" * 4200}, {"role": "assistant", "content": "a"}])
    assert math.isfinite(label_log_probs(model, tokenizer, [(ids, ids)], 1)[0])
