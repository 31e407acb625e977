"""The table of generations: which answers stand beside each other."""

from alignment.evaluation import Heldout, SftReportConfig, measure_sft
from alignment.generation import SamplingSettings
from alignment.models import ModelFiles
from alignment.records import Prompt


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
