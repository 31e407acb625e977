"""Reports: which answers stand beside each other in the table, both sides measured in the same way, one model in memory."""

import weakref

import pytest

from alignment import evaluation
from alignment.evaluation import Heldout, ReportConfig, SftReportConfig, evaluate_policy, measure_sft
from alignment.generation import SamplingSettings
from alignment.models import LoadSettings, ModelFiles
from alignment.records import Conversation, Message, Prompt


def test_the_base_models_column_holds_its_first_answer_to_the_first_prompts(tiny_model, float32):
    """Base and SFT model are the same here, so they give the same sampled answer to the same prompt and seed."""
    files = ModelFiles(tiny_model)
    heldout = Heldout(prompts=tuple(Prompt(id=q, prompt=q) for q in ("Why?", "How many are there?", "Who says so?")))
    settings = SftReportConfig(
        sampling=SamplingSettings(temperature=1.0, max_new_tokens=12), samples_per_prompt=2, base_examples=2, load=float32
    )
    measured, _, rows = measure_sft(settings, base=files, sft=files, evaluator=files, reward_model=files, heldout=heldout)
    texts = [answer.text for answer in measured.answers]
    assert len(set(texts)) == len(texts) == 6
    assert [row["sft"] for row in rows] == texts[::2]
    assert [row["base"] for row in rows] == [texts[0], texts[2], ""]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # `auto` is one of them on any machine
def test_a_policy_that_is_the_sft_checkpoint_has_all_of_its_numbers(tiny_model, dtype):
    files = ModelFiles(tiny_model)
    turns = (Message(role="user", content="Why?"), Message(role="assistant", content="Because it is so."))
    heldout = Heldout(
        prompts=tuple(Prompt(id=q, prompt=q) for q in ("Why?", "How many are there?")),
        demonstrations=(Conversation(id="d", messages=turns),),
    )
    models = {"sft": files, "evaluator": files, "reward_model": files, "heldout": heldout}
    sampling = SamplingSettings(temperature=0, max_new_tokens=12)
    settings = SftReportConfig(sampling=sampling, base_examples=0, load=LoadSettings(dtype=dtype))
    theirs, _, rows = measure_sft(settings, base=files, **models)
    metrics, _ = evaluate_policy(ReportConfig(), theirs=theirs, base_rows=rows, policy=files, **models)
    for side in ("evaluator/score_{}", "reward_model/score_{}", "perplexity/{}", "length/{}"):
        assert metrics[side.format("policy")] == metrics[side.format("sft")]
    assert metrics["evaluator/gain_low"] == metrics["evaluator/gain_high"] == metrics["kl/from_sft"] == 0


def test_no_two_models_are_in_memory_at_a_time(tiny_model, float32, monkeypatch):
    seen, beside = [], []

    def counted(load):
        def run(*args, **kwargs):
            beside.append(sum(model() is not None for model in seen))
            model = load(*args, **kwargs)
            seen.append(weakref.ref(model))
            return model

        return run

    for name in ("load_causal_lm", "load_reward_model"):
        monkeypatch.setattr(evaluation, name, counted(getattr(evaluation, name)))
    files = ModelFiles(tiny_model)
    heldout = Heldout(prompts=(Prompt(id="q", prompt="Why?"),))
    models = {"sft": files, "evaluator": files, "reward_model": files, "heldout": heldout}
    settings = SftReportConfig(sampling=SamplingSettings(max_new_tokens=4), load=float32)
    theirs, _, rows = measure_sft(settings, base=files, **models)
    evaluate_policy(ReportConfig(), theirs=theirs, base_rows=rows, policy=files, **models)
    assert beside == [0] * 8  # SFT, base and two scorers; policy, SFT and two scorers


def test_a_tokenizer_with_code_of_its_own_is_trusted_where_the_settings_say_so(tiny_model, tokenizers_with_code):
    files = ModelFiles(tiny_model)
    heldout = Heldout(prompts=(Prompt(id="q", prompt="Why?"),))
    models = {"sft": files, "evaluator": files, "reward_model": files, "heldout": heldout}
    load = LoadSettings(dtype="float32", trust_remote_code=True)
    settings = SftReportConfig(sampling=SamplingSettings(max_new_tokens=4), load=load)
    theirs, _, rows = measure_sft(settings, base=files, **models)
    evaluate_policy(ReportConfig(), theirs=theirs, base_rows=rows, policy=files, **models)
    with pytest.raises(ValueError, match="trust_remote_code"):
        measure_sft(settings.model_copy(update={"load": LoadSettings(dtype="float32")}), base=files, **models)
