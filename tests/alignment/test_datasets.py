"""Data sets: one split for all of them, so that nothing that is held out is trained on anywhere."""

import json
from pathlib import Path

import pytest

from alignment.critique import critique_request
from alignment.datasets import (
    HumanPreferencesConfig,
    PromptsConfig,
    SftDatasetConfig,
    build_human_preferences,
    build_prompts,
    build_sft_dataset,
)
from alignment.methods.pairs import training_pairs
from alignment.progress import Log
from alignment.readers import (
    NO_VIOLATIONS,
    DataError,
    deduplicate,
    read_conversations,
    read_critiques,
    read_preferences,
    read_problems,
    read_prompts,
    read_records,
)
from alignment.records import Conversation, PreferencePair, Problem, Prompt
from alignment.splits import folded, normalise, split_of

DATA = Path(__file__).parents[2] / "data"
N = 120


def spelled(i, style):
    """The same prompt as different files may spell it."""
    text = f"How do I repair thing number {i}?"
    return [text, text.upper(), f"  {text.replace('?', ' ?!')}", text.replace(" ", "  ")][style % 4]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Four files about the same prompts, spelled differently in each, with duplicates."""
    folder = tmp_path_factory.mktemp("data")
    numbers = range(N)
    pair = [{"prompt": spelled(i, 1), "chosen": f"good {i}", "rejected": f"bad {i}"} for i in numbers]
    pair += [{"prompt": spelled(i, 0), "chosen": f"fine {i}", "rejected": f"worse {i}"} for i in numbers]
    critique = [
        {
            "constitution": "general",
            "principle": "Be kind.",
            "prompt": spelled(i, 2),
            "response": f"no {i}",
            "critique": f"{NO_VIOLATIONS}." if i % 3 == 0 else "It is rude.",
            "revision": None if i % 3 == 0 else f"yes {i}",
        }
        for i in numbers
    ]
    return {
        "data/demonstrations.jsonl": write(
            folder / "demonstrations.jsonl", [{"prompt": spelled(i, 0), "completion": f"done {i}"} for i in numbers]
        ),
        "data/critiques.jsonl": write(folder / "critiques.jsonl", critique),
        "data/preferences.jsonl": write(folder / "preferences.jsonl", [*pair, pair[0], pair[5]]),
        "data/prompts.jsonl": write(
            folder / "prompts.jsonl", [{"prompt": spelled(i, 3), "tags": ["general"]} for i in [*numbers, 3]]
        ),
        "data/reasoning.jsonl": write(
            folder / "reasoning.jsonl", [{"prompt": spelled(i, 1), "answer": str(i)} for i in [*numbers, 3, 3]]
        ),
    }


@pytest.fixture(scope="module")
def shipped():
    if not DATA.exists():
        pytest.skip("data/ is not checked out: dvc pull")
    names = ("demonstrations", "critiques", "preferences", "prompts", "reasoning")
    return {f"data/{name}.jsonl": str(DATA / f"{name}.jsonl") for name in names}


@pytest.fixture(params=["made_up", "shipped"])
def built(request, tmp_path):
    """All three data sets: their sources, folders and counts."""
    sources = request.getfixturevalue(request.param)
    builders = {
        "sft": (build_sft_dataset, SftDatasetConfig()),
        "preferences": (build_human_preferences, HumanPreferencesConfig()),
        "prompts": (build_prompts, PromptsConfig()),
    }
    counts = {}
    for name, (build, config) in builders.items():
        (tmp_path / name).mkdir()
        counts[name] = build(config, sources, tmp_path / name)
    return sources, tmp_path, counts


def critiqued_prompts(conversations, sources):
    """The prompts whose answers the lessons criticise, found by the text that is asked."""
    asked = {
        critique_request(c.prompt, c.response, c.principle): c.prompt for c in read_critiques(sources["data/critiques.jsonl"])
    }
    return [asked[c.messages[0].content] for c in conversations if c.category == "critique"]


def revisions_preferred(sources):
    given, _ = deduplicate(read_critiques(sources["data/critiques.jsonl"]), lambda c: [c.prompt, c.principle, c.response])
    return [
        PreferencePair(id=c.id, prompt=c.prompt, chosen=c.revision, rejected=c.response, domain=c.constitution)
        for c in given
        if c.revision is not None
    ]


def test_no_prompt_is_on_both_sides_of_any_two_data_sets(built):
    sources, folder, _ = built
    sft = read_conversations(folder / "sft" / "train.jsonl")
    train = [c.prompt for c in sft if c.category != "critique"] + critiqued_prompts(sft, sources)
    train += [p.prompt for p in read_preferences(folder / "preferences" / "reward_train.jsonl")]
    train += [p.prompt for p in read_preferences(folder / "preferences" / "evaluator_train.jsonl")]
    train += [p.prompt for p in read_prompts(folder / "prompts" / "train.jsonl")]
    train += [p.prompt for p in read_problems(folder / "prompts" / "problems_train.jsonl")]
    heldout = [c.prompt for c in read_conversations(folder / "sft" / "heldout.jsonl")]
    heldout += [p.prompt for p in read_preferences(folder / "preferences" / "heldout.jsonl")]
    heldout += [p.prompt for p in read_prompts(folder / "prompts" / "heldout.jsonl")]
    heldout += [p.prompt for p in read_problems(folder / "prompts" / "problems_heldout.jsonl")]
    assert len(train) > 2 * len(heldout) > 100
    assert not {normalise(p) for p in train} & {normalise(p) for p in heldout}


def test_reward_model_and_evaluator_learn_from_disjoint_prompts(built):
    _, folder, _ = built
    reward, evaluator = (
        {normalise(p.prompt) for p in read_preferences(folder / "preferences" / f"{name}_train.jsonl")}
        for name in ("reward", "evaluator")
    )
    assert not reward & evaluator
    assert 0.6 < len(reward) / len(evaluator) < 1.7


def test_every_row_arrives_on_one_side_once_and_is_counted(built):
    sources, folder, counts = built
    for name, read, parts, texts in (
        ("preferences", read_preferences, ("reward_train", "evaluator_train", "heldout"), None),
        ("prompts", read_prompts, ("train", "heldout"), lambda p: [p.prompt]),
    ):
        texts = texts or (lambda p: [p.prompt, p.chosen, p.rejected])
        given, twice = deduplicate(read(sources[f"data/{name}.jsonl"]), texts)
        if name == "preferences":
            given = [*given, *revisions_preferred(sources)]
        written = {part: read(folder / name / f"{part}.jsonl") for part in parts}
        assert {part: len(rows) for part, rows in written.items()} == {p: counts[name][f"rows/{p}"] for p in parts}
        assert counts[name]["rows/duplicates_removed"] == twice
        assert sorted(r.id for rows in written.values() for r in rows) == sorted(r.id for r in given)


def test_lessons_follow_the_prompts_they_are_about(built):
    sources, folder, counts = built
    train = read_conversations(folder / "sft" / "train.jsonl")
    heldout = read_conversations(folder / "sft" / "heldout.jsonl")
    lessons = [c for c in train if c.category == "critique"]
    prompts = critiqued_prompts(train, sources)
    assert prompts
    assert {split_of(p, 0.25) for p in prompts} == {"train"}
    assert not [c for c in heldout if c.category == "critique"]
    given, _ = deduplicate(read_critiques(sources["data/critiques.jsonl"]), lambda c: [c.prompt, c.principle, c.response])
    expected = [c for c in given if split_of(c.prompt, 0.25) == "train"]
    assert sorted({normalise(p) for p in prompts}) == sorted({normalise(c.prompt) for c in expected})
    assert {c.critique for c in expected} == {c.messages[1].content for c in lessons}
    assert {c.revision for c in expected if c.revision} == {c.messages[3].content for c in lessons if len(c.messages) == 4}
    assert counts["sft"]["rows/train"] == len(train)
    assert counts["sft"]["rows/train_critiques"] == len(lessons)
    approved = [c for c in train if c.category == "approved"]
    told = {folded(c.prompt) for c in train if c.category not in {"critique", "approved"}}
    assert {(c.prompt, c.messages[1].content) for c in approved} == {
        (c.prompt, c.response) for c in expected if c.revision is None and folded(c.prompt) not in told
    }
    assert counts["sft"]["rows/train_approved_answers"] == len(approved)
    assert counts["sft"]["rows/train_demonstrations"] == len(train) - len(lessons) - len(approved)
    assert counts["sft"]["rows/heldout"] == len(heldout)


def test_the_share_of_longer_chosen_answers_is_over_all_pairs(built):
    sources, _, counts = built
    pairs, _ = deduplicate(read_preferences(sources["data/preferences.jsonl"]), lambda p: [p.prompt, p.chosen, p.rejected])
    pairs += revisions_preferred(sources)
    longer = sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs)
    assert counts["preferences"]["share_chosen_longer"] == pytest.approx(longer)


def test_counts_by_hand(made_up, tmp_path):
    train = sum(split_of(spelled(i, 0), 0.25) == "train" for i in range(N))
    counts = build_prompts(PromptsConfig(), made_up, tmp_path)
    assert counts == {
        "rows/train": train,
        "rows/heldout": N - train,
        "rows/problems_train": train,
        "rows/problems_heldout": N - train,
        "rows/duplicates_removed": 1,
        "rows/problems_duplicates_removed": 2,
    }
    counts = build_human_preferences(HumanPreferencesConfig(critiques=[]), made_up, tmp_path)
    assert counts["rows/heldout"] == 2 * (N - train)
    assert counts["rows/reward_train"] + counts["rows/evaluator_train"] == 2 * train
    assert counts["rows/duplicates_removed"] == 2
    assert counts["rows/from_critiques"] == 0
    assert counts["share_chosen_longer"] == 0.5  # "good" against "bad" and "fine" against "worse"
    # two of three worked critiques have a revision, each a comparison: "yes" over "no"
    counts = build_human_preferences(HumanPreferencesConfig(), made_up, tmp_path)
    revised = N - len(range(0, N, 3))
    assert counts["rows/from_critiques"] == revised
    assert counts["rows/reward_train"] + counts["rows/evaluator_train"] + counts["rows/heldout"] == 2 * N + revised
    assert counts["share_chosen_longer"] == (N + revised) / (2 * N + revised)
    parts = [p for part in ("reward_train", "evaluator_train", "heldout") for p in read_preferences(tmp_path / f"{part}.jsonl")]
    assert {(p.chosen, p.rejected) for p in parts if p.source == "critique"} == {
        (f"yes {i}", f"no {i}") for i in range(N) if i % 3
    }


def test_the_first_prompts_are_a_sample_that_the_order_of_the_file_does_not_decide(made_up, tmp_path):
    rows = [{"prompt": spelled(i, 3), "id": f"n{i}"} for i in range(N)]
    written = []
    for name, order in (("there", rows), ("back", rows[::-1])):
        (tmp_path / name).mkdir()
        source = write(tmp_path / f"{name}.jsonl", order)
        build_prompts(PromptsConfig(), made_up | {"data/prompts.jsonl": source}, tmp_path / name)
        written.append([p.id for p in read_prompts(tmp_path / name / "train.jsonl")])
    assert written[0] == written[1] != sorted(written[0], key=lambda i: int(i[1:]))


def test_the_held_out_fraction_is_the_configured_one(made_up, tmp_path):
    counts = build_prompts(PromptsConfig(heldout_fraction=0.6), made_up, tmp_path)
    assert 0.5 < counts["rows/heldout"] / N < 0.7
    counts = build_human_preferences(HumanPreferencesConfig(evaluator_share=0.2), made_up, tmp_path)
    assert 0.1 < counts["rows/evaluator_train"] / (counts["rows/evaluator_train"] + counts["rows/reward_train"]) < 0.3


def test_several_sources_are_one_data_set(made_up, tmp_path):
    more = write(tmp_path / "more.jsonl", [{"prompt": spelled(3, 1)}, {"prompt": "Something else."}])
    config = PromptsConfig(prompts=["data/prompts.jsonl", "more"])
    counts = build_prompts(config, made_up | {"more": more}, tmp_path)
    assert counts["rows/train"] + counts["rows/heldout"] == N + 1
    assert counts["rows/duplicates_removed"] == 2


def test_critiques_may_be_left_out(made_up, tmp_path):
    counts = build_sft_dataset(SftDatasetConfig(critiques=[]), made_up, tmp_path)
    assert counts["rows/train_critiques"] == 0
    assert counts["rows/train"] == counts["rows/train_demonstrations"] > 0


def test_a_part_without_rows_is_an_error_that_says_what_to_do(tmp_path):
    source = write(tmp_path / "one.jsonl", [{"prompt": "Only one.", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"data/preferences\.jsonl: leaves not a single .* pair after the split\. Remedy"):
        build_human_preferences(HumanPreferencesConfig(critiques=[]), {"data/preferences.jsonl": source}, tmp_path)
    with pytest.raises(DataError, match="not a single"):
        build_prompts(PromptsConfig(), {"data/prompts.jsonl": source}, tmp_path)


def test_conversations_that_are_all_trained_on_or_all_held_out_are_an_error(tmp_path):
    for side, missing in (("train", "held-out"), ("heldout", "training")):
        rows = [{"prompt": p, "completion": "a"} for i in range(20) if split_of(p := f"Prompt {i}", 0.25) == side]
        sources = {"data/demonstrations.jsonl": write(tmp_path / f"{side}.jsonl", rows)}
        says = (
            rf"data/demonstrations\.jsonl: leaves not a single {missing} conversation .*: add rows, or change heldout_fraction\."
        )
        with pytest.raises(DataError, match=says):
            build_sft_dataset(SftDatasetConfig(critiques=[]), sources, tmp_path)


def test_a_setting_that_names_no_file_is_named(made_up, tmp_path):
    for build, config, key in (
        (build_sft_dataset, SftDatasetConfig(demonstrations=[]), "sft_dataset.demonstrations"),
        (build_human_preferences, HumanPreferencesConfig(preferences=[], critiques=[]), "human_preferences.preferences"),
        (build_prompts, PromptsConfig(prompts=[]), "prompts.prompts"),
    ):
        with pytest.raises(DataError) as caught:
            build(config, made_up, tmp_path)
        assert str(caught.value) == f"{key}: names no file. Remedy: name a file or a Hub data set."


def test_problems_may_be_left_out(made_up, tmp_path):
    counts = build_prompts(PromptsConfig(problems=[]), made_up, tmp_path)
    assert counts["rows/problems_train"] == counts["rows/problems_heldout"] == 0
    assert read_records(tmp_path / "problems_train.jsonl", Problem) == []


def written(folder, kind, *parts):
    return {part: read_records(folder / f"{part}.jsonl", kind) for part in parts}


# Questions that differ in punctuation only stay, and are on one side.
ALIKE = ["Sort a list in C++?", "Sort a list in C#?", "What is 12 + 7?", "What is 12 - 7?"]
FILL = [f"Question {i}?" for i in range(40)]


def test_prompts_that_differ_in_punctuation_are_no_duplicates_and_on_one_side(tmp_path):
    rows = [{"prompt": p} for p in [*ALIKE, ALIKE[0].upper(), *FILL]]
    sums = [{"prompt": p, "answer": "19"} for p in [*ALIKE, f" {ALIKE[2]}"]]
    orders = []
    for order in (rows, rows[::-1]):
        sources = {
            "data/prompts.jsonl": write(tmp_path / "p.jsonl", order),
            "data/reasoning.jsonl": write(tmp_path / "q.jsonl", sums),
        }
        counts = build_prompts(PromptsConfig(), sources, tmp_path)
        assert (counts["rows/duplicates_removed"], counts["rows/problems_duplicates_removed"]) == (1, 1)
        parts = written(tmp_path, Prompt, "train", "heldout")
        orders.append([folded(p.prompt) for part in parts.values() for p in part])
        for kind, names in ((Prompt, ("train", "heldout")), (Problem, ("problems_train", "problems_heldout"))):
            train, heldout = ({normalise(p.prompt) for p in part} for part in written(tmp_path, kind, *names).values())
            assert not train & heldout
    assert sorted(orders[0]) == sorted(map(folded, [*ALIKE, *FILL]))
    assert orders[0] == orders[1]


def test_conversations_are_duplicates_only_if_every_turn_is_the_same(tmp_path):
    def talk(*contents, system=None):
        turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, contents, strict=False)]
        return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}

    talks = [
        talk("Hi", "Hello", "How do eggs boil?", "In water."),
        talk("Hi", "Hello", "How do peas boil?", "In water."),
        talk("Hi", "Good morning"),
        talk("Hi", "Good morning", system="Be polite."),
        talk("Hi", "Good morning", system="Be curt."),
    ]
    again = [talk("hi ", "Good  morning"), talk("Hi", "good morning", system="BE CURT.")]
    fill = [{"prompt": p, "completion": "a"} for p in FILL]
    sources = {"data/demonstrations.jsonl": write(tmp_path / "talks.jsonl", [*talks, *again, *fill])}
    counts = build_sft_dataset(SftDatasetConfig(critiques=[]), sources, tmp_path)
    assert counts["rows/duplicates_removed"] == len(again)
    kept = [c for rows in written(tmp_path, Conversation, "train", "heldout").values() for c in rows if c.prompt == "Hi"]
    assert sorted(len(c.messages) for c in kept) == [2, 3, 3, 4, 4]


def test_pairs_are_duplicates_only_if_the_turns_before_them_are_the_same_too(tmp_path):
    def pair(prompt, before=None, chosen="So.", rejected="Not so."):
        history = [{"role": "user", "content": before}, {"role": "assistant", "content": "Yes."}] if before else []
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "history": history}

    pairs = [pair("And then?"), pair("And then?", "Rice?"), pair("And then?", "Peas?"), pair("And then?", chosen="So!")]
    again = [pair("and  then?", "rice?")]
    sources = {"data/preferences.jsonl": write(tmp_path / "p.jsonl", [*pairs, *again, *map(pair, FILL)])}
    counts = build_human_preferences(HumanPreferencesConfig(critiques=[]), sources, tmp_path)
    assert counts["rows/duplicates_removed"] == 1
    kept = written(tmp_path, PreferencePair, "reward_train", "evaluator_train", "heldout")
    assert len([p for rows in kept.values() for p in rows if p.prompt == "And then?"]) == len(pairs)


def test_worked_critiques_of_two_answers_to_one_prompt_are_no_duplicates(tmp_path):
    prompt = next(p for p in FILL if split_of(p, 0.25) == "train")
    bad = {"constitution": "c", "principle": "Be kind.", "prompt": prompt, "response": "Go away.", "critique": "Rude."}
    good = {**bad, "response": "Gladly!", "critique": f"{NO_VIOLATIONS}.", "revision": None}
    rows = [{**bad, "revision": "Gladly."}, good, {**good, "response": "gladly! "}]
    sources = {
        "data/demonstrations.jsonl": write(tmp_path / "d.jsonl", [{"prompt": f"{p}?", "completion": "a"} for p in FILL]),
        "data/critiques.jsonl": write(tmp_path / "c.jsonl", rows),
        "data/preferences.jsonl": write(tmp_path / "p.jsonl", [{"prompt": p, "chosen": "a", "rejected": "b"} for p in FILL]),
    }
    counts = build_sft_dataset(SftDatasetConfig(), sources, tmp_path)
    assert (counts["rows/train_critiques"], counts["rows/duplicates_removed"]) == (2, 1)
    # the demonstrations ask "Question 0??", which is another prompt
    assert counts["rows/train_approved_answers"] == 1
    counts = build_human_preferences(HumanPreferencesConfig(), sources, tmp_path)
    assert (counts["rows/from_critiques"], counts["rows/duplicates_removed"]) == (1, 1)


def test_rows_of_several_files_that_number_alike_get_ids_of_their_own(tmp_path):
    def source(folder, kind, **columns):
        (tmp_path / folder).mkdir(exist_ok=True)
        return write(tmp_path / folder / f"{kind}.jsonl", [{"id": i, "prompt": f"{folder} {i}?", **columns} for i in range(40)])

    worked = {"constitution": "c", "principle": "Be kind.", "response": "No."}
    sources = {}
    for folder in "ab":
        sources |= {
            f"{folder}/talks": source(folder, "talks", completion="So."),
            f"{folder}/pairs": source(folder, "pairs", chosen="So.", rejected="Not so."),
            f"{folder}/critiques": source(folder, "critiques", critique="Curt.", revision="Yes.", **worked),
            f"{folder}/prompts": source(folder, "prompts"),
            f"{folder}/problems": source(folder, "problems", answer="4"),
        }
    first, again, third, fourth = ([f"{i}{end}" for i in range(40)] for end in ("", "-2", "-3", "-4"))
    two = {kind: [f"a/{kind}", f"b/{kind}"] for kind in ("talks", "pairs", "critiques", "prompts", "problems")}

    build_human_preferences(HumanPreferencesConfig(preferences=two["pairs"], critiques=two["critiques"]), sources, tmp_path)
    parts = ("reward_train", "evaluator_train", "heldout")
    pairs = [p for part in parts for p in read_preferences(tmp_path / f"{part}.jsonl")]
    assert sorted(p.id for p in pairs) == sorted([*first, *again, *third, *fourth])
    assert {p.id for p in pairs if p.prompt.startswith("a") and p.source == "human"} == set(first)
    assert {p.id for p in pairs if p.prompt.startswith("b") and p.source == "critique"} == set(fourth)

    build_sft_dataset(SftDatasetConfig(demonstrations=two["talks"], critiques=two["critiques"]), sources, tmp_path)
    talks = [*read_conversations(tmp_path / "train.jsonl"), *read_conversations(tmp_path / "heldout.jsonl")]
    assert len({c.id for c in talks}) == len(talks)
    assert {c.id for c in talks if c.category != "critique"} == {*first, *again}

    build_prompts(PromptsConfig(prompts=two["prompts"], problems=two["problems"]), sources, tmp_path)
    for read, names in ((read_prompts, ("train", "heldout")), (read_problems, ("problems_train", "problems_heldout"))):
        rows = [row for name in names for row in read(tmp_path / f"{name}.jsonl")]
        assert sorted(row.id for row in rows) == sorted([*first, *again])


def test_files_of_one_name_without_ids_get_ids_of_their_own(tmp_path):
    sources = {}
    for folder in "ab":
        (tmp_path / folder).mkdir()
        sources[folder] = write(tmp_path / folder / "train.jsonl", [{"prompt": f"{folder} {i}?"} for i in range(20)])
    build_prompts(PromptsConfig(prompts=["a", "b"], problems=[]), sources, tmp_path)
    rows = [*read_prompts(tmp_path / "train.jsonl"), *read_prompts(tmp_path / "heldout.jsonl")]
    ids = [f"train-{i}" for i in range(1, 21)]
    assert sorted(row.id for row in rows) == sorted([*ids, *(f"{i}-2" for i in ids)])


def test_an_id_depends_on_the_rows_before_alone(tmp_path):
    sources = {
        "a": write(tmp_path / "a.jsonl", [{"id": "x", "prompt": "a?"}, {"id": "y", "prompt": "b?"}]),
        "b": write(tmp_path / "b.jsonl", [{"id": "x", "prompt": "c?"}, {"id": "x-2", "prompt": "d?"}]),
        "c": write(
            tmp_path / "c.jsonl", [{"id": "x", "prompt": "e?"}, {"id": "z", "prompt": "A?"}, {"id": "z-1", "prompt": "f?"}]
        ),
        "more": write(tmp_path / "more.jsonl", [{"prompt": p} for p in FILL]),
    }
    ids = {"a?": "x", "b?": "y", "c?": "x-2", "d?": "x-2-2", "e?": "x-3", "f?": "z-1"}
    for names in (["a", "b", "c", "more"], ["a", "b", "more"]):
        build_prompts(PromptsConfig(prompts=names, problems=[]), sources, tmp_path)
        rows = [*read_prompts(tmp_path / "train.jsonl"), *read_prompts(tmp_path / "heldout.jsonl")]
        known = {row.prompt: row.id for row in rows if row.prompt in ids}
        assert known == {prompt: ids[prompt] for prompt in known}
        assert len(known) == (6 if "c" in names else 4)


def test_a_users_pairs_are_human_pairs_whatever_their_column_source_says(made_up, tmp_path):
    rows = [{"prompt": p, "chosen": "So.", "rejected": "Not so.", "source": "sharegpt"} for p in FILL]
    made = [{**row, "prompt": f"Made {i}?", "source": "constitutional"} for i, row in enumerate(rows)]
    reviewed = [{**row, "prompt": f"Reviewed {i}?", "source": "human"} for i, row in enumerate(rows)]
    sources = made_up | {"data/preferences.jsonl": write(tmp_path / "p.jsonl", [*rows, *made, *reviewed])}
    build_human_preferences(HumanPreferencesConfig(), sources, tmp_path)
    pairs = read_records(tmp_path / "reward_train.jsonl", PreferencePair)
    constitutional = PreferencePair(id="c", prompt="c", chosen="a", rejected="b", source="constitutional")
    joined = [p.prompt for p in training_pairs([constitutional], pairs, -1, seed=0) if p != constitutional]
    assert {prompt.split()[0] for prompt in joined} == {"Question", "Reviewed"}
    assert sorted(joined) == sorted(p.prompt for p in pairs if p.prompt.startswith(("Question", "Reviewed")))


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose data sets are the rows that a test puts under their names."""
    import datasets
    from huggingface_hub import constants

    rows = {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: rows[name])
    return rows


def test_bad_rows_of_a_hub_data_set_are_skipped_counted_and_told(hub, made_up, tmp_path):
    hub["someone/pairs"] = [{"prompt": f"Question {i}?", "chosen": "So.", "rejected": "Not so."} for i in range(100)]
    for i in (10, 20, 30, 40, 50):
        hub["someone/pairs"][i]["chosen"] = ""
    said = []
    config = HumanPreferencesConfig(preferences=["someone/pairs", "data/preferences.jsonl"], critiques=[])
    sources = made_up | {"someone/pairs": "someone/pairs"}
    counts = build_human_preferences(config, sources, tmp_path, log=Log(say=said.append))
    assert counts["rows/skipped"] == 5
    assert counts["rows/reward_train"] + counts["rows/evaluator_train"] + counts["rows/heldout"] == 95 + 2 * N
    assert said[0] == "someone/pairs: skipped 5 of 100 rows, which cannot be used"
    assert said[1:] == [f"skipped: someone/pairs, row {i}, field 'chosen': is empty" for i in (11, 21, 31)]


def test_rows_skipped_are_counted_over_all_data_sets_on_the_hub_and_only_there(hub, made_up, tmp_path):
    hub["someone/talks"] = [{"prompt": p, "completion": "So." if i else ""} for i, p in enumerate(FILL)]
    hub["someone/prompts"] = [{"prompt": p} for p in FILL]
    sources = made_up | {name: name for name in hub}
    talks = SftDatasetConfig(demonstrations=["someone/talks"])
    assert build_sft_dataset(talks, sources, tmp_path)["rows/skipped"] == 1
    assert build_prompts(PromptsConfig(prompts=["someone/prompts"]), sources, tmp_path)["rows/skipped"] == 0
    assert "rows/skipped" not in build_prompts(PromptsConfig(), sources, tmp_path)


def test_too_many_bad_rows_of_a_hub_data_set_are_an_error(hub, tmp_path):
    hub["someone/prompts"] = [{"prompt": "" if i in (7, 8, 9) else f"Question {i}?"} for i in range(59)]
    with pytest.raises(DataError) as caught:
        build_prompts(PromptsConfig(prompts=["someone/prompts"], problems=[]), {"someone/prompts": "someone/prompts"}, tmp_path)
    assert str(caught.value).startswith(
        "someone/prompts: 3 of 59 rows cannot be used, and more than 5% is too many to skip; "
        "the first: someone/prompts, row 8, field 'prompt': is empty. Remedy: name another data set"
    )


def test_a_bad_row_of_a_local_file_is_an_error_however_rare(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": p} for p in [*FILL, ""]])
    with pytest.raises(DataError, match=r"p\.jsonl, line 41, field 'prompt': is empty"):
        build_prompts(PromptsConfig(problems=[]), {"data/prompts.jsonl": source}, tmp_path)


def test_a_held_out_prompt_is_not_trained_on_as_an_earlier_or_later_turn_either(tmp_path):
    heldout = next(p for i in range(99) if split_of(p := f"Prompt {i}", 0.25) == "heldout")
    train = [p for i in range(99) if split_of(p := f"Prompt {i}", 0.25) == "train"]
    talks = [
        {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, (p, "a", heldout, "b"), strict=True)]}
        for p in train[:3]
    ]
    talks += [{"prompt": p, "completion": "a"} for p in train[3:]]
    lessons = {"data/demonstrations.jsonl": write(tmp_path / "talks.jsonl", talks)}
    build_sft_dataset(SftDatasetConfig(critiques=[]), lessons, tmp_path)
    assert heldout not in {m.content for c in read_conversations(tmp_path / "train.jsonl") for m in c.messages}
    before = [{"role": "user", "content": heldout}, {"role": "assistant", "content": "Yes."}]
    pairs = [{"prompt": p, "history": before, "chosen": "a", "rejected": "b"} for p in train[:9]]
    pairs += [{"prompt": p, "chosen": "a", "rejected": "b"} for p in [heldout, *train[9:]]]
    sources = {"data/preferences.jsonl": write(tmp_path / "pairs.jsonl", pairs)}
    build_human_preferences(HumanPreferencesConfig(critiques=[]), sources, tmp_path)
    trained = read_preferences(tmp_path / "reward_train.jsonl") + read_preferences(tmp_path / "evaluator_train.jsonl")
    assert heldout not in {m.content for p in trained for m in p.history}


def test_the_shipped_data_is_as_large_and_as_balanced_as_the_demo_needs(shipped):
    conversations = read_conversations(Path(shipped["data/demonstrations.jsonl"]))
    assert len(conversations) >= 160
    assert sum(len(c.user_turns) > 1 for c in conversations) >= 20
    pairs = read_preferences(Path(shipped["data/preferences.jsonl"]))
    assert len(pairs) >= 300
    assert sum(p.domain == "cooking" for p in pairs) >= 20
    longer = sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs)
    assert 0.4 <= longer <= 0.6
    lessons = read_critiques(Path(shipped["data/critiques.jsonl"]))
    assert len(lessons) >= 100
    assert {"general", "medical", "coding", "customer_service", "tutor"} <= {lesson.constitution for lesson in lessons}
    prompts = read_prompts(Path(shipped["data/prompts.jsonl"]))
    assert len(prompts) >= 200
    intents = [set(p.tags) & {"harmful-intent", "borderline-but-fine", "benign"} for p in prompts]
    assert all(len(one) == 1 for one in intents)
    assert len(read_problems(Path(shipped["data/reasoning.jsonl"]))) >= 300
