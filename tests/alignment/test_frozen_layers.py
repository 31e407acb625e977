"""Layers below all adapters run once per answer and PPO step, and everything comes out as if they ran every time."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import alignment.methods.ppo as ppo
from alignment.chat import prompt_ids
from alignment.generation import SamplingSettings
from alignment.methods.frozen_layers import FrozenLayers, NotFrozen
from alignment.methods.ppo import PpoConfig, train_ppo
from alignment.methods.roles import Sequences, make_roles
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
from alignment.reward import score
from alignment.rewards import RewardWeights, Task
from alignment.tiny_model import build_tiny_model

LAYERS = 5
POLICY, CRITIC = LoraSettings(target_modules=["all-linear"], dropout=0.1, last_layers=3), {"last_layers": 2}
TASKS = [Task(({"role": "user", "content": f"question {i}"},), "2") for i in range(4)]
ROWS = [([5, 9, 30, 41], [50, 60]), ([7, 8], [70, 71, 72, 73, 74, 75, 76]), ([5, 9, 30, 41], [52])]


def load_of(architecture, dtype="float32", **settings):
    return LoadSettings(dtype=dtype, attention="sdpa" if architecture in ("llama", "gpt2") else "eager", **settings)


def built(folder, architecture):
    """The folder of a tiny model of five layers."""
    build_tiny_model(folder, architecture="gpt2" if architecture == "gpt2" else "llama", layers=LAYERS)
    if architecture in ("llama", "gpt2"):
        return folder
    from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoConfig

    tokenizer = load_tokenizer(folder)
    common = {"vocab_size": len(tokenizer), "hidden_size": 64, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    if architecture == "gemma2":  # scales its embeddings, caps its logits, and has layers of two kinds
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4}
        config = Gemma2Config(num_hidden_layers=LAYERS, intermediate_size=128, **heads, **common)
    else:  # its layers return tuples
        kinds = [[["global"], LAYERS]]
        config = GPTNeoConfig(num_layers=LAYERS, num_heads=4, attention_types=kinds, max_position_embeddings=512, **common)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


def adapter(base, folder, lora, task="CAUSAL_LM"):
    """An adapter that does something: B is not 0."""
    from peft import get_peft_model

    load, tokenizer = LoadSettings(dtype="float32", attention="eager"), load_tokenizer(base)
    files = ModelFiles(base)
    model = load_causal_lm(files, load) if task == "CAUSAL_LM" else load_reward_model(files, load, tokenizer=tokenizer)
    torch.manual_seed(len(task))
    model = get_peft_model(model, lora_config(lora, model, task))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return ModelFiles(base, folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """SFT adapter (last 3 of 5 layers) and reward adapter (last 2) over a base, by its architecture."""
    known = {}

    def of(architecture):
        if architecture not in known:
            folder = tmp_path_factory.mktemp(architecture)
            base = built(folder / "base", architecture)
            reward = POLICY.model_copy(update=CRITIC)
            known[architecture] = (
                adapter(base, folder / "sft", POLICY),
                adapter(base, folder / "reward", reward, "SEQ_CLS"),
            )
        return known[architecture]

    return of


def roles_of(sft, reward, load, **changed):
    settings = {"lora": POLICY, "full": False, "share_base": True, "critic_from_reward": reward is not None, "seed": 0}
    return make_roles(sft, reward, load, reward_tokenizer=load_tokenizer(sft.base), **settings | changed)


def frozen_in(roles, batch_size=8):
    return FrozenLayers(roles.policy_model, [name for name, _ in roles.on_shared_base], batch_size)


@pytest.fixture(scope="module")
def train(models, tmp_path_factory):
    """A PPO run of three steps. Returns what was trained, its metrics, its folder and what the log said."""

    def run(architecture="llama", folder=None, metrics=None, **settings):
        folder = folder or tmp_path_factory.mktemp("ppo")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        sft, reward = models(architecture)
        given = {
            "steps": 3,
            "batch_size": 8,
            "mini_batches": 2,
            "micro_batch_size": 4,
            "ppo_epochs": 2,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "sampling": SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=6),
            "load": LoadSettings(dtype="float32"),
            "rewards": RewardWeights(reward_model=1.0),
            "save_every": 1,
        }
        said = []
        trained, final = train_ppo(
            PpoConfig(**given | settings),
            sft,
            reward,
            TASKS,
            work=folder / "work",
            out=folder / "out",
            log=Log(say=said.append, **({"metrics": metrics} if metrics else {})),
        )
        return SimpleNamespace(curves=trained.curves, metrics=final, folder=folder / "out" / "model", said=said)

    return run


def skips(run):
    return any("are computed once per answer and step" in text for text in run.said)


# --- The same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neo"])
def test_each_role_gives_the_same_from_its_first_adapted_layer(models, architecture, dtype):
    sft, reward = models(architecture)
    roles, tokenizer = roles_of(sft, reward, load_of(architecture, dtype)), load_tokenizer(sft.base)
    frozen = frozen_in(roles)
    assert frozen.depths == {"default": 2, "reference": 2, "critic": 3, "reward": 3}
    batch = Sequences.of(ROWS, tokenizer.pad_token_id, roles.policy_model.device)
    frozen.check(batch.inputs)
    texts = [[*task.messages, {"role": "assistant", "content": answer}] for task, answer in zip(TASKS, "abcd", strict=True)]
    results = []
    for each in (None, frozen):
        roles.start_from(each)
        for role in (roles.policy, roles.critic):
            for parameter in role.trainable().values():
                parameter.grad = None
        scores = torch.tensor(score(roles.scorer, tokenizer, texts, 3))
        with torch.no_grad():
            reference, entropy = roles.reference.log_probs(batch, 0.7)
        log_probs, _ = roles.policy.log_probs(batch, 0.7)
        log_probs.sum().backward()
        values = roles.critic.values(batch)
        values.sum().backward()
        gradients = [p.grad for role in (roles.policy, roles.critic) for p in role.trainable().values() if p.grad is not None]
        results.append([scores, reference, entropy, log_probs.detach(), values.detach(), *gradients])
    assert len(results[0]) > 20
    relative = 1e-5 if dtype == "float32" else 0.03
    for ordinary, skipping in zip(*results, strict=True):
        assert (skipping - ordinary).abs().max() <= relative * ordinary.abs().max() + 1e-7


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("load", "close"),
    [
        (LoadSettings(dtype="float32"), 1e-5),
        (LoadSettings(dtype="bfloat16"), 0.05),
        (LoadSettings(dtype="float32", quantization="nf4"), 1e-4),
    ],
    ids=["float32", "bfloat16", "nf4"],
)
def test_a_run_gives_the_same_with_and_without(train, largest_difference, architecture, load, close):
    if load.quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    # One step in 16 bit: what is rounded otherwise samples other answers in the next.
    steps = 1 if load.dtype == "bfloat16" else 3
    once, always = (train(architecture, load=load, steps=steps, reuse_frozen_layers=reuse) for reuse in (True, False))
    assert skips(once)
    assert not skips(always)
    assert once.curves["ratio/first_pass_off"][0][1] < 1e-5
    assert once.curves["objective/kl"][0][1] == 0
    assert once.curves.keys() == always.curves.keys()
    for name, points in always.curves.items():
        values = [value for _, value in points]
        assert [value for _, value in once.curves[name]] == pytest.approx(values, abs=close, rel=close), name
    assert largest_difference(once.folder, always.folder) < (2e-3 if load.dtype == "bfloat16" else close)  # of steps of 1e-3


@pytest.fixture(scope="module")
def usual(train):
    return train()


def test_how_a_batch_is_cut_does_not_change_the_result(train, usual, largest_difference):
    runs = [train(micro_batch_size=1, score_batch_size=1), usual]
    assert all(map(skips, runs))
    assert largest_difference(*(run.folder for run in runs)) < 1e-5


def test_a_killed_run_ends_like_one_that_was_not(train, usual, interrupted, largest_difference, tmp_path):
    def dying(step, values):
        if step == 2:
            raise interrupted

    with pytest.raises(interrupted):
        train(folder=tmp_path, metrics=dying)
    resumed = train(folder=tmp_path)
    assert any("resumed at step 1" in text for text in resumed.said)
    assert skips(resumed)
    assert largest_difference(resumed.folder, usual.folder) < 1e-6
    assert resumed.metrics == pytest.approx(usual.metrics, abs=1e-5)


# --- How often they run -----------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(monkeypatch):
    """Counts the positions that each layer of a Llama computes, outside of sampling."""
    original, count, sampling = LlamaDecoderLayer.forward, Counter(), []

    def forward(self, hidden_states, *args, **kwargs):
        if not sampling:
            count[self.self_attn.layer_idx] += hidden_states.shape[0] * hidden_states.shape[1]
        return original(self, hidden_states, *args, **kwargs)

    def generate(model, tokenizer, conversations, *args, **kwargs):
        sampling.append(True)
        answers = ppo_generate(model, tokenizer, conversations, *args, **kwargs)
        sampling.clear()
        count.rows = [(*prompt_ids(tokenizer, c), *a.ids) for c, a in zip(conversations, answers, strict=True)]
        return answers

    ppo_generate = ppo.generate
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    monkeypatch.setattr(ppo, "generate", generate)
    return count


@pytest.mark.parametrize("reuse", [True, False])
def test_the_frozen_layers_run_once_per_answer_and_step(train, tokens, reuse):
    steps = []

    def metrics(step, values):
        steps.append((dict(tokens), tokens.rows))
        tokens.clear()

    settings = {"rewards": RewardWeights(reward_model=0.0, exact_answer=1.0), "critic_start": "sft"}
    train(metrics=metrics, reuse_frozen_layers=reuse, micro_batch_size=1, **settings)  # 1: no padding
    for count, rows in steps[1:]:  # the first step's hold the comparison with the ordinary way
        every = (3 + 2 * 2) * sum(map(len, rows))  # policy, reference, critic; policy and critic in each of two epochs
        once = sum(map(len, set(rows)))
        assert count == {layer: once if reuse and layer < 2 else every for layer in range(LAYERS)}


def test_a_longer_row_serves_for_its_beginning(models, tokens):
    sft, reward = models("llama")
    roles = roles_of(sft, reward, LoadSettings(dtype="float32"))
    frozen, device = frozen_in(roles), roles.policy_model.device
    roles.start_from(frozen)
    prompt, answer = ROWS[1]
    whole, part = (Sequences.of([(prompt, answer[:length])], 0, device) for length in (7, 4))
    with torch.no_grad():
        roles.policy.log_probs(whole, 1.0)
        before = dict(tokens)
        kept, _ = roles.policy.log_probs(part, 1.0)
        assert tokens[0] == before[0]
        frozen.forget()
        anew, _ = roles.policy.log_probs(part, 1.0)
        assert tokens[0] == before[0] + 6
    torch.testing.assert_close(kept, anew, atol=1e-5, rtol=0)


# --- Falling back -----------------------------------------------------------------------------------------------------


def falls_back(run, reason):
    assert not skips(run)
    assert [text for text in run.said if "every role computes all layers in every epoch" in text and reason in text]
    assert math.isfinite(run.metrics["train/policy_loss"])
    assert run.curves["ratio/first_pass_off"][0][1] < 1e-5


def test_models_of_their_own_share_no_layers(train):
    falls_back(train(share_base=False, steps=1), "a model of its own")


@pytest.fixture
def last_layer(monkeypatch):
    """Has the last layer of a Llama do more: `then(states, together)` with its states and whether the first ran in this pass."""

    def becomes(then):
        original, first = LlamaDecoderLayer.forward, []

        def forward(self, hidden_states, *args, position_embeddings, **kwargs):
            if self.self_attn.layer_idx == 0:
                first[:] = [position_embeddings]  # made anew in each pass
            if self.self_attn.layer_idx == LAYERS - 1:
                hidden_states = then(hidden_states, bool(first) and first[0] is position_embeddings)
            return original(self, hidden_states, *args, position_embeddings=position_embeddings, **kwargs)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)

    return becomes


def test_a_layer_that_reads_what_another_one_left_is_found_out(train, last_layer):
    last_layer(lambda states, together: states + states.roll(1, -1) * together)
    falls_back(train(steps=1), "hidden states differ by")


def test_a_layer_that_cannot_run_alone_is_found_out(train, last_layer):
    def needs_the_first(states, together):
        if not together:
            raise KeyError("what the first layer leaves")
        return states

    last_layer(needs_the_first)
    falls_back(train(steps=1), "cannot be run from its middle")


def test_after_an_error_the_layers_are_as_they_were(models, monkeypatch):
    sft, reward = models("llama")
    roles = roles_of(sft, reward, LoadSettings(dtype="float32"))
    frozen = frozen_in(roles)
    roles.start_from(frozen)
    batch = Sequences.of(ROWS, 0, roles.policy_model.device)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError), torch.no_grad():
        patched.setattr("alignment.methods.roles.next_token_logits", lambda *args: 1 / 0)
        roles.policy.log_probs(batch, 1.0)
    assert not any("forward" in vars(layer) for layer in roles.policy_model.get_base_model().model.layers)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "training mode"),
        (lambda model: model.get_base_model().gradient_checkpointing_enable(), "gradient checkpointing"),
        (lambda model: setattr(model.config, "num_hidden_layers", 4), "0 lists of 4 layers"),
    ],
)
def test_what_is_not_frozen_is_refused(models, change, reason):
    roles = roles_of(*models("llama"), LoadSettings(dtype="float32"))
    change(roles.policy_model)
    with pytest.raises(NotFrozen, match=reason):
        frozen_in(roles)


@pytest.mark.parametrize(
    "lora",
    [
        POLICY.model_copy(update={"last_layers": 0}),
        POLICY.model_copy(update={"target_modules": ["q_proj", "embed_tokens"], "last_layers": 0}),
    ],
)
def test_adapters_everywhere_leave_nothing_frozen(models, tmp_path, lora):
    sft, _ = models("llama")
    roles = roles_of(adapter(sft.base, tmp_path, lora), None, LoadSettings(dtype="float32"))
    with pytest.raises(NotFrozen, match="the first layer, too, or the embeddings"):
        frozen_in(roles)


def test_rows_trained_for_added_tokens_leave_nothing_frozen(models, tmp_path):
    import json
    import shutil

    sft, _ = models("llama")
    base = tmp_path / "base"
    shutil.copytree(sft.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"untrained_token_ids": [1, 2]}))
    roles = roles_of(adapter(base, tmp_path / "sft", POLICY), None, LoadSettings(dtype="float32"))
    with pytest.raises(NotFrozen, match="or the embeddings"):
        frozen_in(roles)


# --- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sampling_leaves_every_weight_as_it_was(models, architecture, dtype):
    sft, reward = models(architecture)
    roles = roles_of(sft, reward, LoadSettings(dtype=dtype))
    ids = torch.tensor([[5, 9, 30, 41]])
    before = {name: p.detach().clone() for name, p in roles.policy_model.named_parameters()}
    with torch.no_grad():
        with roles.policy.active() as model:
            expected = model(input_ids=ids).logits if dtype == "float32" else None
        with roles.policy.sampling() as model:
            logits = model(input_ids=ids).logits
            changed = {
                name
                for name, p in model.named_parameters()
                if "base_layer" in name and not torch.equal(p, before[f"base_model.model.{name}"])
            }
    if dtype == "float32":
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert bool(changed) == (dtype == "float32")
    after = dict(roles.policy_model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after.keys() == before.keys()
    assert not any(getattr(module, "merged", False) for module in roles.policy_model.modules())
