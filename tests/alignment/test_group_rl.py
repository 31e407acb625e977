"""GRPO and RLOO: the papers' losses, sampling as everywhere else, measured KL, rewards that may not apply, kills."""

import hashlib

import pytest
import torch

from alignment.chat import conversation_ids, prompt_ids
from alignment.errors import UserError
from alignment.methods import METHODS, group_rl
from alignment.methods.grpo import train_grpo
from alignment.methods.rloo import train_rloo
from alignment.models import LoraSettings, ModelFiles, load_causal_lm, load_reward_model, load_tokenizer
from alignment.reward import score
from alignment.rewards import RewardWeights, Task, problem_task, total_rewards
from alignment.sft import NothingToTrain
from alignment.training import OptimSettings

TRAIN = {"grpo": train_grpo, "rloo": train_rloo}
CORRECT = RewardWeights(reward_model=0.0, exact_answer=1.0)
CHAT = Task(({"role": "user", "content": "Question 3, but chat"},))
both = pytest.mark.parametrize("name", TRAIN)


@pytest.fixture(scope="module")
def tasks(problems):
    return [problem_task(p) for p in problems]


@pytest.fixture(scope="module")
def train(sft_adapter, tiny_model, tasks, float32, tmp_path_factory):
    """Trains in a folder of its own or, to resume, in a given one. Two groups of four answers a step unless told otherwise."""

    def run(name, folder=None, of=None, start=None, reward_model=None, log=None, optim=None, **settings):
        folder = folder or tmp_path_factory.mktemp(name)
        for sub in ("work", "out"):
            (folder / sub).mkdir(exist_ok=True)
        given = {
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "micro_batch_size": 8,
            "save_every": 2,
        }
        config = METHODS[name].config(
            **{"load": float32, "num_generations": 4, "max_new_tokens": 6, "rewards": CORRECT, **settings},
            optim=OptimSettings(**given | (optim or {})),
        )
        kwargs = {"log": log} if log else {}
        reward_model = reward_model or ModelFiles(tiny_model)  # its head is drawn from seed 0: any score will do
        trained, metrics = TRAIN[name](
            config, start or sft_adapter, reward_model, of or tasks, work=folder / "work", out=folder / "out", **kwargs
        )
        return trained, metrics, folder / "out" / "model"

    return run


@pytest.fixture
def sampled(monkeypatch):
    """The (prompt ids, answer ids) of every batch that is sampled."""
    batches = []

    def recording(model, tokenizer, prompts, *args, **kwargs):
        answers = group_rl_sample_ids(model, tokenizer, prompts, *args, **kwargs)
        batches.append(list(zip(prompts, answers, strict=True)))
        return answers

    group_rl_sample_ids = group_rl.sample_ids
    monkeypatch.setattr(group_rl, "sample_ids", recording)
    return batches


def curve(trained, name="loss"):
    return [value for _, value in trained.curves[name]]


# --- The losses -------------------------------------------------------------------------------------------------------

TEMPERATURE, BETA, EPSILON, LIMIT = 0.7, 0.3, 0.05, 6


def token_log_probs(files, float32, rows):
    """log p of each answer's tokens, one tensor a row, by a plain forward pass."""
    model = load_causal_lm(files, float32)
    out = []
    for prompt, answer in rows:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
        out.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).squeeze(-1))
    return out


def grpo_loss(rewards, new, old, loss_type):
    groups = rewards.view(-1, 4)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    per_token = []
    for advantage, ours, before in zip(advantages, new, old, strict=True):
        ratio = (ours - before).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
        kl = (before - ours).exp() - (before - ours) - 1  # the policy that sampled is still the reference
        per_token.append(BETA * kl - gain)
    if loss_type == "grpo":
        return torch.stack([losses.mean() for losses in per_token]).mean()
    return torch.cat(per_token).sum() / (sum(map(len, per_token)) if loss_type == "dapo" else LIMIT * len(per_token))


def rloo_loss(rewards, new, old, _):
    groups = rewards.view(-1, 4)
    advantages = (groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten()
    ratio = torch.stack([(ours - before).sum() for ours, before in zip(new, old, strict=True)]).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages).mean()


@pytest.mark.parametrize(
    ("name", "by_hand", "loss_type"),
    [("grpo", grpo_loss, t) for t in ("grpo", "dapo", "dr_grpo")] + [("rloo", rloo_loss, None)],
)
def test_the_loss_is_the_papers(train, sampled, four_answers, tiny_model, float32, tasks, name, by_hand, loss_type):
    # The second update on one batch of answers, from the policy as it was after the first: the same run, ended earlier.
    settings = {
        "of": tasks[:2],
        "rewards": RewardWeights(reward_model=2.0),
        "temperature": TEMPERATURE,
        "beta": BETA,
        "epsilon": EPSILON,
        "max_new_tokens": LIMIT,
        "start": four_answers,
        "finetuning": "full",
        "optim": {"learning_rate": 1e-3},
        **({"loss_type": loss_type} if loss_type else {}),
    }
    one, _, folder = train(name, **settings)
    two, _, _ = train(name, **settings, updates_per_batch=2)
    assert (one.steps, two.steps) == (1, 2)
    assert curve(two)[0] == pytest.approx(curve(one)[0], abs=1e-6)
    rows, again = sampled
    assert rows == again
    tokenizer = load_tokenizer(tiny_model)
    judge = load_reward_model(ModelFiles(tiny_model), float32, tokenizer=tokenizer)
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for _, answer in rows]
    finished = [
        [*task.messages, {"role": "assistant", "content": text or " "}]
        for task, text in zip(tasks_of(rows, tasks, tokenizer), texts, strict=True)
    ]
    rewards = 2 * torch.tensor(score(judge, tokenizer, finished, 8))
    assert rewards.view(-1, 4).std(1).min() > 1e-3
    old = token_log_probs(four_answers, float32, rows)
    new = token_log_probs(ModelFiles(folder), float32, rows)
    assert curve(two)[1] == pytest.approx(by_hand(rewards, new, old, loss_type).item(), rel=1e-2)
    assert abs(curve(two)[1]) > 1e-4
    assert curve(two, "clip_ratio/region_mean")[1] > 0
    assert curve(two, "reward") == [pytest.approx(rewards.mean().item(), abs=1e-4)]  # sampled once


def tasks_of(rows, tasks, tokenizer):
    of_prompt = {tuple(prompt_ids(tokenizer, list(t.messages))): t for t in tasks}
    return [of_prompt[tuple(prompt)] for prompt, _ in rows]


# --- Sampling ---------------------------------------------------------------------------------------------------------


@both
def test_groups_are_of_one_prompt_and_answers_end_at_eos(train, sampled, tiny_model, name):
    trained, metrics, _ = train(name, optim={"epochs": 0.5})
    eos = load_tokenizer(tiny_model).eos_token_id
    assert len(sampled) == trained.steps == 4
    for step, batch in enumerate(sampled):
        prompts = [prompt for prompt, _ in batch]
        assert prompts[:4] == prompts[:1] * 4 != prompts[4:] == prompts[4:5] * 4
        assert len({tuple(answer) for _, answer in batch}) > 1
        assert all(eos not in answer[:-1] and 1 <= len(answer) <= 6 for _, answer in batch)
        ended = [answer[-1] == eos for _, answer in batch]
        assert curve(trained, "completions/clipped_ratio")[step] == pytest.approx(1 - sum(ended) / 8)
        assert curve(trained, "completions/mean_length")[step] == pytest.approx(sum(len(a) for _, a in batch) / 8)
    assert any(a[-1] == eos for batch in sampled for _, a in batch)
    assert metrics["train/mean_length_last"] == curve(trained, "completions/mean_length")[-1]


@both
def test_special_tokens_that_are_typed_stay_text(train, sampled, tiny_model, name):
    typed = Task(({"role": "user", "content": "hi<|im_end|>\n<|im_start|>assistant\n42<|im_end|>"},), "42")
    train(name, of=[typed, typed])
    tokenizer = load_tokenizer(tiny_model)
    for prompt, _ in sampled[0]:
        assert prompt == prompt_ids(tokenizer, list(typed.messages))
        assert prompt.count(tokenizer.eos_token_id) == 1


@both
def test_no_two_answers_share_their_noise(train, sampled, name):
    train(name, of=[CHAT], rewards=RewardWeights(), temperature=20.0, optim={"epochs": 6, "learning_rate": 1e-9})
    assert len({tuple(answer) for batch in sampled for _, answer in batch}) == 8 * len(sampled) == 24


def test_tasks_with_a_long_prompt_are_dropped_and_counted(train, tasks):
    long = Task(({"role": "user", "content": "x" * 300},), "42")
    _, metrics, _ = train("grpo", of=[*tasks[:4], long], max_prompt_length=250)
    assert (metrics["train/tasks"], metrics["train/tasks_dropped_too_long"]) == (4, 1)
    with pytest.raises(NothingToTrain, match=r"none of 1 tasks .* max_prompt_length 250.*Remedy"):
        train("grpo", of=[long], max_prompt_length=250)


def test_every_pass_sees_every_task_once_in_a_seeded_order():
    def order(tasks=6, seed=0, **settings):
        config = METHODS["grpo"].config(
            num_generations=4, optim=OptimSettings(batch_size=8, micro_batch_size=8, seed=seed, **settings)
        )
        return group_rl.task_order(tasks, config)

    assert sorted(order(epochs=1)) == list(range(6))
    two = order(epochs=2)
    assert sorted(two[:6]) == sorted(two[6:]) == list(range(6))
    assert two[:6] == order(epochs=1) != two[6:]
    assert order(epochs=2, seed=1) != two
    assert [len(order(7, epochs=e)) for e in (0.01, 0.5, 1, 3)] == [2, 4, 8, 20]  # whole steps of two groups, at least one


# --- Reference and KL -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["adapter", "new adapter", "full"])
def test_it_starts_at_the_reference_and_leaves_it_alone(train, sft_adapter, name, kind):
    start = sft_adapter if kind == "adapter" else ModelFiles(sft_adapter.base)
    lora = LoraSettings(dropout=0.0, target_modules=["all-linear"])
    before = hashlib.sha256((sft_adapter.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    trained, metrics, folder = train(
        name, start=start, finetuning="full" if kind == "full" else "lora", lora=lora, optim={"epochs": 1, "learning_rate": 3e-3}
    )
    kl = curve(trained, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(map(abs, kl[-3:])) > 1e-3
    assert metrics["train/kl_last"] == kl[-1]
    weights = ["model.safetensors"] if kind == "full" else ["adapter_model.safetensors"]
    assert [p.name for p in folder.rglob("*.safetensors")] == weights
    assert before == hashlib.sha256((sft_adapter.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


@both
def test_kl_is_measured_without_being_penalised(train, largest_difference, monkeypatch, name):
    settings = {"beta": 0.0, "optim": {"learning_rate": 1e-2, "epochs": 0.5}}
    measured, metrics, folder = train(name, **settings)
    assert max(map(abs, curve(measured, "kl"))) > 1e-4
    assert "train/kl_last" in metrics
    monkeypatch.setattr(group_rl, "MEASURED_ONLY", 0.0)
    unmeasured, metrics, other = train(name, **settings)
    assert "kl" not in unmeasured.curves
    assert "train/kl_last" not in metrics
    assert largest_difference(folder, other) < 1e-6


@both
def test_a_larger_beta_stays_closer_to_the_reference(train, name):
    far, near = (train(name, beta=beta, optim={"epochs": 2, "learning_rate": 3e-3})[0] for beta in (0.0, 3.0))
    assert sum(map(abs, curve(near, "kl")[-6:])) < 0.5 * sum(map(abs, curve(far, "kl")[-6:]))


def test_all_weights_of_an_adapter_cannot_be_trained(train):
    with pytest.raises(UserError, match=r"finetuning: full needs an SFT checkpoint that is a full model.*Remedy"):
        train("grpo", finetuning="full")


# --- Rewards ----------------------------------------------------------------------------------------------------------


@both
def test_rewards_are_weighted_and_logged_each(train, name):
    weights = RewardWeights(reward_model=0.0, exact_answer=3.0, answer_format=0.5)
    trained, metrics, _ = train(name, rewards=weights)
    for i in range(trained.steps):
        correct, form = curve(trained, "rewards/exact_answer")[i], curve(trained, "rewards/answer_format")[i]
        assert curve(trained, "reward")[i] == pytest.approx(3 * correct + 0.5 * form, abs=1e-5)
    assert 0 < max(curve(trained, "rewards/exact_answer")) <= 1
    assert metrics["train/reward_last"] == curve(trained, "reward")[-1]
    assert metrics["train/exact_answer_last"] == curve(trained, "rewards/exact_answer")[-1]


@both
def test_a_reward_that_does_not_apply_is_left_out(train, tasks, name):
    trained, _, _ = train(name, of=[CHAT] * 8, rewards=RewardWeights(reward_model=1.0, exact_answer=5.0))
    assert "rewards/exact_answer" not in trained.curves
    assert curve(trained, "reward") == pytest.approx(curve(trained, "rewards/reward_model"), abs=1e-5)
    with pytest.raises(UserError, match=r"none of exact_answer applies to the prompt 'Question 3, but chat'"):
        train(name, of=[CHAT])


@both
def test_a_reward_model_reads_texts_with_its_own_tokenizer(train, other_base, tiny_model, float32, monkeypatch, name):
    steps = []

    def recording(functions, rollouts):
        totals, values = total_rewards(functions, rollouts)
        steps.append((rollouts, values["reward_model"]))
        return totals, values

    monkeypatch.setattr(group_rl, "total_rewards", recording)
    other = ModelFiles(other_base)
    train(name, rewards=RewardWeights(reward_model=1.0), reward_model=other, optim={"epochs": 0.1})
    own = load_tokenizer(other_base)
    judge = load_reward_model(other, float32, tokenizer=own)
    ((rollouts, rewards),) = steps
    finished = [[*r.task.messages, {"role": "assistant", "content": r.completion or " "}] for r in rollouts]
    assert rewards == pytest.approx(score(judge, own, finished, 1), abs=1e-4)
    assert max(rewards) - min(rewards) > 1e-3
    assert conversation_ids(own, finished[0]) != conversation_ids(load_tokenizer(tiny_model), finished[0])


@both
def test_groups_without_variance_are_counted_and_teach_nothing(train, sft_adapter, largest_difference, name):
    never = RewardWeights(reward_model=0.0, answer_format=1.0)
    trained, metrics, folder = train(name, rewards=never, beta=0.0)
    assert curve(trained, "zero_variance_groups") == [1.0] * trained.steps
    assert metrics["train/zero_variance_groups_last"] == 1.0
    assert largest_difference(folder, sft_adapter.adapter) < 1e-4
    trained, _, _ = train(name, beta=0.5, optim={"epochs": 2})
    assert 0 < sum(curve(trained, "zero_variance_groups")) < trained.steps  # also where a KL penalty makes them differ


# --- The same result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "updates", "stop"), [("grpo", 1, 11), ("grpo", 2, 7), ("rloo", 1, 3), ("rloo", 2, 7)])
def test_a_killed_training_ends_like_one_that_was_not(
    train, recording_log, interrupted, largest_difference, tmp_path, name, updates, stop
):
    settings = {"updates_per_batch": updates, "optim": {"epochs": 1.5 / updates, "scheduler": "cosine"}}
    uninterrupted, metrics, folder = train(name, **settings)
    assert uninterrupted.steps == 12
    log, _ = recording_log(until=stop)
    with pytest.raises(interrupted):
        train(name, tmp_path, log=log, **settings)
    log, seen = recording_log()
    resumed, again, resumed_folder = train(name, tmp_path, log=log, **settings)
    assert seen[0][0] == stop  # checkpoints are saved every 2 steps; this one was logged but not saved
    assert largest_difference(resumed_folder, folder) < 1e-5
    for metric in ("reward", "kl", "completions/mean_length", "zero_variance_groups"):
        assert curve(resumed, metric) == pytest.approx(curve(uninterrupted, metric), abs=1e-5)
    assert again == pytest.approx(metrics, abs=1e-5)


@both
def test_the_layout_does_not_change_the_result(train, largest_difference, name):
    usual = {"rewards": RewardWeights(), "optim": {"learning_rate": 3e-4}}
    trained, _, folder = train(name, **usual)
    for layout in (
        {"optim": {"learning_rate": 3e-4, "micro_batch_size": 2}},
        {"sample_batch_size": 3, "score_batch_size": 1},
        {"optim": {"learning_rate": 3e-4, "gradient_checkpointing": True, "save_every": 1}},
    ):
        other, _, other_folder = train(name, **usual | layout)
        assert curve(other, "reward") == pytest.approx(curve(trained, "reward"), abs=1e-4)
        assert largest_difference(folder, other_folder) < 1e-4


@both
def test_seeds_decide(train, largest_difference, name):
    (_, _, a), (_, _, b), (_, _, c) = (train(name, optim={"seed": seed}) for seed in (0, 0, 1))
    assert largest_difference(a, b) == 0
    assert largest_difference(a, c) > 1e-4


# --- What is refused --------------------------------------------------------------------------------------------------


def test_batches_of_broken_groups_and_checkpoints_between_updates_are_refused():
    config = METHODS["grpo"].config
    with pytest.raises(ValueError, match=r"batch_size 12 must be a multiple of num_generations 8"):
        config(optim=OptimSettings(batch_size=12, micro_batch_size=4))
    with pytest.raises(ValueError, match=r"save_every 5 must be a multiple of updates_per_batch 2"):
        config(updates_per_batch=2, optim=OptimSettings(save_every=5, batch_size=8))
