"""PPO: it starts at ratio 1 and KL 0, learns what is rewarded, leaves the reference alone, and survives kills.

The task: an SFT checkpoint answers every question with a digit from 0 to 3, each as likely as the others; one of them is right.
"""

import math

import pytest
import torch
from pydantic import ValidationError
from transformers.models.llama import modeling_llama

import alignment.methods.ppo as ppo
from alignment.chat import conversation_ids, prompt_ids
from alignment.errors import UserError
from alignment.generation import SamplingSettings, generate
from alignment.likelihood import answer_log_probs
from alignment.methods.ppo import PpoConfig, train_ppo
from alignment.methods.roles import Sequences, make_roles, micro_batches
from alignment.models import LoadSettings, LoraSettings, ModelFiles, load_causal_lm, load_reward_model, load_tokenizer
from alignment.records import Conversation, Message, PreferencePair
from alignment.reward import RewardConfig, score, train_reward_model
from alignment.rewards import RewardWeights, Task, total_rewards
from alignment.sft import NothingToTrain, SftConfig, train_sft
from alignment.training import OptimSettings

DIGITS = "0123"
QUESTIONS = [f"question {i}" for i in range(4)]
TASKS = [Task(({"role": "user", "content": q},), "2") for q in QUESTIONS]
ANSWERED = [[*t.messages, {"role": "assistant", "content": d}] for t in TASKS for d in DIGITS]
LORA = LoraSettings(target_modules=["all-linear"], dropout=0.05)
REWARD_LORA = LORA.model_copy(update={"dropout": 0.0})


@pytest.fixture(scope="module")
def base(tiny_model, float32, tmp_path_factory):
    """A full model that answers with any of the digits and ends."""
    return ModelFiles(fine_tuned(ModelFiles(tiny_model), tmp_path_factory, float32, "full", epochs=200, learning_rate=3e-3))


@pytest.fixture(scope="module")
def sft(base, float32, tmp_path_factory):
    """An SFT adapter over it, LoRA dropout in its configuration, that does the same."""
    return ModelFiles(base.base, fine_tuned(base, tmp_path_factory, float32, "lora", epochs=4, learning_rate=1e-3))


def fine_tuned(start, tmp_path_factory, load, finetuning, **optim):
    folder = tmp_path_factory.mktemp(finetuning)
    (folder / "work").mkdir()
    # Each digit is also asked for by name: that gives it a direction of its own in the vocabulary's matrix, which adapters leave
    # as it is. Without it no adapter could tell the digits far apart.
    asked = [(q, d) for q in QUESTIONS for d in DIGITS] + [(f"say {d}", d) for d in DIGITS for _ in range(4)]
    rows = [
        Conversation(id=f"{i}", messages=(Message(role="user", content=q), Message(role="assistant", content=d)))
        for i, (q, d) in enumerate(asked)
    ]
    optim = OptimSettings(batch_size=32, micro_batch_size=32, save_every=1000, **optim)
    config = SftConfig(finetuning=finetuning, lora=LORA, load=load, optim=optim)
    train_sft(config, start, rows, [], work=folder / "work", out=folder)
    return folder / "model"


@pytest.fixture(scope="module")
def scorer(base, float32, tmp_path_factory):
    """A reward model, an adapter of the same base, that prefers larger digits."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "work").mkdir()
    pairs = [
        PreferencePair(id=f"{q}{a}{b}", prompt=q, chosen=a, rejected=b)
        for q in QUESTIONS
        for a in DIGITS
        for b in DIGITS
        if a > b
    ]
    optim = OptimSettings(epochs=20, learning_rate=1e-2, batch_size=24, micro_batch_size=24, save_every=100)
    config = RewardConfig(lora=REWARD_LORA, load=float32, optim=optim)
    _, metrics, _ = train_reward_model(config, base, pairs, pairs, work=folder / "work", out=folder)
    assert metrics["heldout/accuracy"] > 0.95
    return ModelFiles(base.base, folder / "model")


@pytest.fixture(scope="module")
def train(sft, float32, tmp_path_factory):
    """Trains in a folder of its own or, to resume, in a given one."""

    def run(folder=None, tasks=TASKS, start=None, reward_model=None, log=None, **settings):
        folder = folder or tmp_path_factory.mktemp("ppo")
        for name in ("work", "out"):
            (folder / name).mkdir(exist_ok=True)
        given = {
            "steps": 4,
            "batch_size": 16,
            "micro_batch_size": 16,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-2,
            "scheduler": "linear",
            "kl_coef": 0.05,
            "rewards": RewardWeights(reward_model=0.0, exact_answer=1.0),
            "critic_start": "sft",
            "sampling": SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=4),
            "load": float32,
            "save_every": 2,
        }
        config = PpoConfig(**given | settings)
        kwargs = {"log": log} if log else {}
        trained, metrics = train_ppo(
            config, start or sft, reward_model, tasks, work=folder / "work", out=folder / "out", **kwargs
        )
        return trained, metrics, folder / "out" / "model"

    return run


@pytest.fixture(scope="module")
def four_steps(train):
    return train()


def curve(trained, name):
    return [value for _, value in trained.curves[name]]


def share_right(files, digit="2"):
    """How often an answer is exactly the digit, in 64 samples of each question."""
    tokenizer = load_tokenizer(files.base)
    model = load_causal_lm(files, LoadSettings(dtype="float32"))
    conversations = [list(task.messages) for task in TASKS for _ in range(64)]
    sampling = SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=4)
    answers = generate(model, tokenizer, conversations, sampling, seeds=range(len(conversations)))
    return sum(a.text == digit for a in answers) / len(answers)


# --- The first pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_base", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_starts_at_ratio_1_and_kl_0(train, scorer, share_base, dtype):
    rewards = RewardWeights(reward_model=1.0)
    trained, metrics, _ = train(
        steps=1,
        mini_batches=2,
        share_base=share_base,
        load=LoadSettings(dtype=dtype),
        rewards=rewards,
        reward_model=scorer,
        critic_start="reward_model",
    )
    assert curve(trained, "ratio/first_pass_off")[0] < 1e-5
    assert metrics["train/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert curve(trained, "objective/kl")[0] == 0
    assert curve(trained, "objective/rlhf_reward")[0] == curve(trained, "objective/scores")[0]


def test_the_log_probs_are_those_of_all_other_stages(sft, float32):
    tokenizer = load_tokenizer(sft.base)
    roles = roles_of(sft, None, float32)
    ids = [
        (prompt_ids(tokenizer, t.messages), tokenizer(d, add_special_tokens=False)["input_ids"]) for t in TASKS for d in DIGITS
    ]
    with torch.no_grad():
        batch = Sequences.of(ids, tokenizer.pad_token_id, "cpu")
        ours, entropy = roles.policy.log_probs(batch, temperature=1.0)
    model = load_causal_lm(sft, float32)
    theirs = answer_log_probs(
        model, tokenizer, [list(t.messages) for t in TASKS for _ in DIGITS], [d for _ in TASKS for d in DIGITS], 4
    )
    torch.testing.assert_close(
        torch.stack([row.sum() for row in ours.split(batch.counts)]), torch.tensor(theirs), atol=1e-4, rtol=0
    )
    assert entropy.mean().item() == pytest.approx(math.log(4), abs=0.2)  # four digits, about equally likely


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_it_learns_the_right_answer_and_the_critic_learns_to_expect_it(train, sft, seed):
    assert 0.1 < share_right(sft) < 0.5
    trained, metrics, folder = train(steps=12, batch_size=32, seed=seed)
    assert share_right(ModelFiles(sft.base, folder)) > 0.9
    assert metrics["train/scores_last"] > 0.9 > 0.5 > metrics["train/scores_first"]
    assert metrics["train/kl_last"] > 0.5  # log 4 = 1.39 for certainty
    assert metrics["train/entropy_last"] < 0.3
    assert curve(trained, "loss/value")[-1] < 0.3 * curve(trained, "loss/value")[0]


def test_a_reward_model_is_followed(train, sft, scorer):
    _, metrics, folder = train(
        steps=12,
        batch_size=32,
        kl_coef=0.3,  # near the reference: elsewhere the reward model was never trained
        rewards=RewardWeights(reward_model=1.0),
        reward_model=scorer,
        critic_start="reward_model",
    )
    assert metrics["train/scores_last"] > metrics["train/scores_first"] + 0.3
    assert share_right(ModelFiles(sft.base, folder), "3") > 0.8


def test_kl_charges_keep_it_near_the_reference(train):
    kl = [train(steps=10, kl_coef=coefficient)[1]["train/kl_last"] for coefficient in (0.0, 3.0)]
    assert kl[1] < 0.3 * kl[0]


def test_the_adaptive_controller_moves_the_coefficient(train):
    trained, _, _ = train(steps=6, kl_controller="adaptive", kl_target=0.001, kl_horizon=16, kl_coef=0.01)
    coefficients = curve(trained, "kl_coef")
    assert coefficients[0] == 0.01
    assert coefficients[-1] > 0.015


def test_an_answer_without_eos_is_charged(train):
    short = SamplingSettings(temperature=1.0, top_k=0, max_new_tokens=1)  # a digit, and no room for EOS
    cut, metrics, _ = train(steps=1, sampling=short, missing_eos_penalty=0.7)
    free, _, _ = train(steps=1, sampling=short, missing_eos_penalty=0.0)
    assert metrics["train/eos_rate_last"] == 0
    assert curve(free, "objective/scores")[0] - curve(cut, "objective/scores")[0] == pytest.approx(0.7, abs=1e-6)


# --- Roles ------------------------------------------------------------------------------------------------------------


def roles_of(sft, reward, load, **changed):
    settings = {"lora": LORA, "full": False, "share_base": True, "critic_from_reward": reward is not None, "seed": 0}
    return make_roles(sft, reward, load, reward_tokenizer=load_tokenizer(sft.base), **settings | changed)


def test_one_base_and_four_models_give_the_same_policy(train, scorer, largest_difference):
    settings = {"rewards": RewardWeights(reward_model=1.0), "reward_model": scorer, "critic_start": "reward_model"}
    one, _, a = train(share_base=True, **settings)
    four, _, b = train(share_base=False, **settings)
    for name in ("objective/scores", "objective/kl", "loss/value", "loss/policy", "critic/value"):
        assert curve(four, name) == pytest.approx(curve(one, name), abs=1e-4), name
    assert largest_difference(a, b) < 1e-4


def test_the_shared_scorer_gives_the_reward_models_scores(sft, scorer, float32):
    tokenizer = load_tokenizer(sft.base)
    alone = score(load_reward_model(scorer, float32, tokenizer=tokenizer), tokenizer, ANSWERED, 5)
    shared = score(roles_of(sft, scorer, float32).scorer, tokenizer, ANSWERED, 5)
    assert shared == pytest.approx(alone, abs=1e-5)


def test_the_critic_starts_as_the_reward_model(sft, scorer, float32):
    tokenizer = load_tokenizer(sft.base)
    roles = roles_of(sft, scorer, float32)
    prompt = prompt_ids(tokenizer, TASKS[0].messages)
    digit = tokenizer("3", add_special_tokens=False)["input_ids"]
    ids = (prompt, [*digit, tokenizer.eos_token_id, 0])
    with torch.no_grad():
        values = roles.critic.values(Sequences.of([ids], tokenizer.pad_token_id, "cpu"))
    # The value before the token after EOS is computed where the reward model reads its score.
    expected = score(roles.scorer, tokenizer, [[*TASKS[0].messages, {"role": "assistant", "content": "3"}]], 1)
    assert values[-1].item() == pytest.approx(expected[0], abs=1e-5)


def test_the_reference_stays_the_sft_checkpoint(train, sft, scorer, float32, monkeypatch):
    kept = []
    monkeypatch.setattr(ppo, "make_roles", lambda *a, **k: kept.append(make_roles(*a, **k)) or kept[0])
    tokenizer = load_tokenizer(sft.base)
    ids = [(prompt_ids(tokenizer, t.messages), tokenizer("31", add_special_tokens=False)["input_ids"]) for t in TASKS]
    batch = Sequences.of(ids, tokenizer.pad_token_id, "cpu")
    with torch.no_grad():
        before, _ = roles_of(sft, scorer, float32).policy.log_probs(batch, 1.0)
    train(steps=6, rewards=RewardWeights(reward_model=1.0), reward_model=scorer, critic_start="reward_model")
    with torch.no_grad():
        reference, _ = kept[0].reference.log_probs(batch, 1.0)
        policy, _ = kept[0].policy.log_probs(batch, 1.0)
    assert torch.equal(reference, before)
    assert (policy - before).abs().max() > 0.1


def test_a_reward_model_over_another_base_reads_texts_with_its_own_tokenizer(
    train, sft, other_base, float32, tmp_path, monkeypatch
):
    (tmp_path / "work").mkdir()
    pairs = [PreferencePair(id=q, prompt=q, chosen="3", rejected="0") for q in QUESTIONS]
    optim = OptimSettings(epochs=4, learning_rate=1e-2, batch_size=4, micro_batch_size=4)
    train_reward_model(
        RewardConfig(lora=REWARD_LORA, load=float32, optim=optim),
        ModelFiles(other_base),
        pairs,
        pairs,
        work=tmp_path / "work",
        out=tmp_path,
    )
    other = ModelFiles(other_base, tmp_path / "model")
    weights = RewardWeights(reward_model=1.0)
    steps = []

    def recording(functions, rollouts):
        totals, values = total_rewards(functions, rollouts)
        steps.append((rollouts, values["reward_model"]))
        return totals, values

    monkeypatch.setattr(ppo, "total_rewards", recording)
    trained, _, _ = train(steps=2, rewards=weights, reward_model=other, critic_start="sft")
    own = load_tokenizer(other_base)
    judge = load_reward_model(other, float32, tokenizer=own)
    assert len(steps) == 2
    for logged, (rollouts, rewards) in zip(curve(trained, "rewards/reward_model"), steps, strict=True):
        finished = [[*r.task.messages, {"role": "assistant", "content": r.completion or " "}] for r in rollouts]
        assert rewards == pytest.approx(score(judge, own, finished, 1), abs=1e-4)
        assert logged == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)
        assert max(rewards) - min(rewards) > 1e-2
        assert conversation_ids(own, finished[0]) != conversation_ids(load_tokenizer(sft.base), finished[0])
    with pytest.raises(UserError, match=r"critic_start: the reward model stands on another base.*Remedy"):
        train(steps=2, rewards=weights, reward_model=other, critic_start="reward_model")


def test_full_models_are_trained_as_four(train, base):
    for finetuning, weights in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        trained, _, folder = train(start=base, finetuning=finetuning, steps=2, learning_rate=1e-3)
        assert curve(trained, "objective/kl")[0] == 0
        assert curve(trained, "objective/kl")[1] != 0
        assert [p.name for p in folder.rglob("*.safetensors")] == [weights]


def test_rewards_over_a_16_bit_base_are_float32_numbers(sft, scorer):
    half, tokenizer = LoadSettings(dtype="bfloat16"), load_tokenizer(sft.base)
    shared, alone = roles_of(sft, scorer, half).scorer, load_reward_model(scorer, half, tokenizer=tokenizer)
    scores = [torch.tensor(score(model, tokenizer, ANSWERED, 5)) for model in (shared, alone)]
    for rewards in scores:
        assert (rewards != rewards.bfloat16()).float().mean() > 0.9
    torch.testing.assert_close(*scores, rtol=0.05, atol=0.05)


def test_full_models_compute_in_16_bit_and_keep_their_weights_in_32(base, scorer):
    roles = roles_of(base, scorer, LoadSettings(dtype="bfloat16"), full=True, critic_from_reward=False)
    batch, tokenizer, computed = Sequences.of([([5, 9, 30], [50, 60])], 0, "cpu"), load_tokenizer(base.base), []
    for role in (roles.policy, roles.reference, roles.critic):
        model = role._model
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: computed.append(out.dtype))
        role.values(batch) if role is roles.critic else role.log_probs(batch, 1.0)
        assert set(computed) == {torch.bfloat16}
        computed.clear()
    with roles.policy.sampling() as model:
        generate(model, tokenizer, [list(TASKS[0].messages)], SamplingSettings(temperature=0, max_new_tokens=4))
    assert set(computed) == {torch.bfloat16}
    assert roles.scorer.get_input_embeddings().weight.dtype == torch.bfloat16


def test_full_models_train_in_16_bit_too(train, base):
    half = LoadSettings(dtype="bfloat16")
    trained, metrics, _ = train(start=base, finetuning="full", load=half, steps=2, learning_rate=1e-3)
    assert metrics["train/ratio_first"] == 1
    assert curve(trained, "objective/kl")[0] == 0
    assert curve(trained, "objective/kl")[1] != 0


def test_passes_that_nobody_goes_on_from_gather_no_keys_and_values(sft, scorer, float32, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a cache")

    monkeypatch.setattr(modeling_llama, "DynamicCache", forbidden)
    roles, tokenizer = roles_of(sft, scorer, float32), load_tokenizer(sft.base)
    batch = Sequences.of([([5, 9, 30], [50, 60])], 0, "cpu")
    roles.policy.log_probs(batch, 1.0)[0].sum().backward()
    roles.critic.values(batch).sum().backward()
    told = ANSWERED[:1]
    for model in (roles.scorer, load_reward_model(scorer, float32, tokenizer=tokenizer)):
        score(model, tokenizer, told, 1)
    answer_log_probs(load_causal_lm(sft, float32), tokenizer, [told[0][:1]], ["0"], 1)


def test_all_weights_of_an_adapter_cannot_be_trained(train):
    with pytest.raises(UserError, match=r"finetuning: full needs an SFT checkpoint that is a full model.*Remedy"):
        train(finetuning="full")


# --- Kills and layout -------------------------------------------------------------------------------------------------


def test_a_killed_training_ends_like_one_that_was_not(train, interrupted, largest_difference, tmp_path):
    from alignment.progress import Log

    seen = []

    def dying(step, values):
        seen.append(step)
        if step == 3 and len(seen) == 3:
            raise interrupted

    # The adaptive controller's coefficient is carried along, too; a killed PPO with the fixed one is in `test_any_base.py`.
    settings = {"kl_controller": "adaptive", "kl_horizon": 64, "mini_batches": 2}
    uninterrupted, metrics, folder = train(**settings)
    with pytest.raises(interrupted):
        train(tmp_path, log=Log(metrics=dying), **settings)
    resumed, again, resumed_folder = train(tmp_path, log=Log(metrics=dying), **settings)
    assert seen == [1, 2, 3, 3, 4]  # saved after step 2
    assert largest_difference(resumed_folder, folder) < 1e-6
    assert resumed.curves.keys() == uninterrupted.curves.keys()
    for name in resumed.curves:
        assert curve(resumed, name) == pytest.approx(curve(uninterrupted, name), abs=1e-5), name
    assert again == pytest.approx(metrics, abs=1e-5)


def test_how_a_batch_is_cut_does_not_change_the_result(train, largest_difference):
    whole, _, a = train(micro_batch_size=16)
    ones, _, b = train(micro_batch_size=1)
    for name in ("objective/scores", "loss/policy", "loss/value", "policy/approxkl"):
        assert curve(ones, name) == pytest.approx(curve(whole, name), abs=1e-4), name
    assert largest_difference(a, b) < 1e-3


@pytest.mark.parametrize(
    ("lengths", "most", "cpu", "elsewhere"),
    [
        ([100, 100, 100], 8, [[0, 1, 2]], [[0, 1, 2]]),
        ([40, 100, 41, 180], 8, [[0, 2], [1], [3]], [[0, 2, 1, 3]]),  # one pass more saves more than 32 padded tokens
        ([60, 50, 70, 55], 8, [[1, 3, 0, 2]], [[1, 3, 0, 2]]),  # here it would save 20 or 30
        ([10, 10, 10, 10, 500], 4, [[0, 1, 2, 3], [4]], [[0, 1, 2, 3], [4]]),
        ([5] * 5, 2, None, None),
        ([], 2, [], []),
    ],
)
def test_micro_batches_hold_neighbours_in_length(lengths, most, cpu, elsewhere):
    for device, expected in (("cpu", cpu), ("cuda", elsewhere)):
        batches = micro_batches(lengths, most, torch.device(device))
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert max(map(len, batches), default=0) <= most
        if expected is None:
            assert len(batches) == 3
        else:
            assert batches == expected


# --- What comes out, and what is refused ------------------------------------------------------------------------------


def test_only_the_policy_is_saved_and_loads_without_this_library(four_steps, sft):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, _, folder = four_steps
    assert [str(p.relative_to(folder)) for p in folder.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(sft.base)), str(folder))
    assert list(policy.peft_config) == ["default"]


def test_the_metrics_people_know_are_there(four_steps):
    trained, _, _ = four_steps
    known = {
        "objective/kl",
        "objective/scores",
        "objective/rlhf_reward",
        "objective/non_score_reward",
        "objective/entropy",
        "policy/approxkl",
        "policy/clipfrac",
        "policy/ratio",
        "loss/policy",
        "loss/value",
        "critic/explained_variance",
        "eos_rate",
        "length/mean",
        "lr",
    }
    assert known <= trained.curves.keys()
    assert all(len(trained.curves[name]) == 4 for name in known)


def test_what_cannot_be_trained_is_refused(train, scorer):
    with pytest.raises(NothingToTrain, match=r"none of 4 prompts has at most 3 tokens.*Remedy"):
        train(max_prompt_length=3)
    with pytest.raises(UserError, match=r"rewards: every weight is 0.*Remedy"):
        train(rewards=RewardWeights(reward_model=0.0))
    with pytest.raises(UserError, match=r"rewards.reward_model: there is no reward model.*Remedy"):
        train(rewards=RewardWeights(reward_model=1.0))
    with pytest.raises(UserError, match=r"none of exact_answer applies to the prompt.*Remedy"):
        train(tasks=[Task(TASKS[0].messages)])
    with pytest.raises(ValidationError, match="multiple of mini_batches"):
        PpoConfig(batch_size=10, mini_batches=3)
    for changed in ({"top_k": 50}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValidationError, match=r"top_k must be 0 and sampling.repetition_penalty 1.*whole softmax"):
            PpoConfig(sampling=SamplingSettings(**{"temperature": 1.0, "top_k": 0, **changed}))
