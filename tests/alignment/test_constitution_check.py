"""The check of a constitution before it is used, and the template that people start from."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from alignment.constitution_check import check, main
from alignment.constitutions import ConstitutionError, load_constitution

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "docs" / "constitution_template.yaml"
RECIPES = ROOT / "conf" / "recipes"


@pytest.fixture
def prompts(tmp_path):
    """A function that writes prompts, so many of each intent, with the tag cooking."""

    def write(**intents):
        rows = [
            {"id": f"{intent}-{i}", "prompt": f"What is the {intent} of dish number {i}?", "tags": ["cooking", intent]}
            for intent, count in intents.items()
            for i in range(count)
        ]
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [path]

    return write


def test_the_template_is_a_constitution_and_is_no_partition(tmp_path):
    rules = load_constitution(shutil.copy(TEMPLATE, tmp_path / "cooking.yaml"))
    assert len(rules.principles) >= 2
    assert rules.critique_tags == ()
    assert not list((ROOT / "conf" / "constitutions").glob("*template*"))


def test_the_template_and_the_guide_explain_every_key():
    from alignment.constitutions import Constitution

    keys = set(Constitution.model_fields) - {"name", "text"}
    template = TEMPLATE.read_text(encoding="utf-8")
    assert set(yaml.safe_load(template)) == keys - {"preference_domains"}  # few have pairs enough for a domain of their own
    assert "\n# preference_domains: [" in template
    guide = (ROOT / "docs" / "writing_a_constitution.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in guide for key in keys)


def test_prompts_are_counted_by_side_and_intent(prompts):
    lines = check(TEMPLATE, prompts(benign=40), RECIPES / "demo.yaml")
    assert lines[0] == "constitution_template: 4 principles: food_safety, doable, asks_about_allergies, honest"
    train = int(lines[1].split()[4])
    assert lines[1:] == [
        f"prompts with its tags: {train} for training, {40 - train} held out for the reports",
        f"criticised in training: {train} ({train} benign)",
    ]


def test_the_recipes_tags_count_where_the_constitution_has_none(prompts, tmp_path):
    path = tmp_path / "cooking.yaml"
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("critique_tags: []\n", ""), encoding="utf-8")
    lines = check(path, prompts(benign=40, **{"harmful-intent": 8}), RECIPES / "demo.yaml")
    assert "harmful-intent)" in lines[2]
    assert "benign" not in lines[2]
    assert "fewer than 20 prompts are criticised" in lines[3]
    with pytest.raises(ConstitutionError, match=r"cooking\.yaml: of \d+ training prompts .* none would be criticised\. Remedy"):
        check(path, prompts(benign=40), RECIPES / "demo.yaml")


def test_too_few_principles_for_the_recipes_rounds_are_a_warning(prompts, tmp_path):
    path = tmp_path / "cooking.yaml"
    content = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(content | {"principles": content["principles"][:1]}), encoding="utf-8")
    assert any("2 rounds were asked for" in line for line in check(path, prompts(benign=40), RECIPES / "gpu.yaml"))


def test_prompts_too_few_for_the_gate_are_a_warning(prompts, tmp_path):
    recipe = tmp_path / "recipe.yaml"

    def warnings(text):
        recipe.write_text(text, encoding="utf-8")
        return [line for line in check(TEMPLATE, prompts(benign=40), recipe) if line.startswith("warning")]

    assert warnings("") == []
    (warning,) = warnings("champion: {min_prompts: 30}")
    assert "19 held-out prompts would be compared, and the gate asks for 30" in warning
    assert "no policy would be promoted" in warning
    (warning,) = warnings("sft_report: {max_prompts: 9}")
    assert "9 held-out prompts would be compared, and the gate asks for 10" in warning


def test_without_harmless_heldout_prompts_a_warning_says_what_is_not_measured(prompts):
    def warnings(**intents):
        return [line for line in check(TEMPLATE, prompts(**intents), RECIPES / "demo.yaml") if line.startswith("warning")]

    (warning,) = warnings(**{"harmful-intent": 60})
    assert "tagged benign or borderline-but-fine: over-refusal could not be measured, and no policy would be promoted" in warning
    assert warnings(**{"harmful-intent": 60, "borderline-but-fine": 10}) == []


def test_a_recipe_elsewhere_may_extend_a_shipped_one_and_names_the_prompts(prompts, tmp_path, capsys, monkeypatch):
    (path,) = prompts(benign=40)
    shipped = check(TEMPLATE, [path], RECIPES / "demo.yaml")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: demo\nprompts: {{prompts: [{path}]}}\n", encoding="utf-8")
    main([str(TEMPLATE), "--recipe", str(recipe)])
    assert capsys.readouterr().out.splitlines() == shipped
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe.write_text(f"extends: demo\nprompts: {{prompts: [~/{path.name}]}}\n", encoding="utf-8")
    assert check(TEMPLATE, None, recipe) == shipped


def test_the_command_prints_or_ends_with_one_sentence(prompts, tmp_path, capsys):
    main([str(TEMPLATE), "--prompts", str(prompts(benign=40)[0]), "--recipe", str(RECIPES / "demo.yaml")])
    assert "4 principles" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no such constitution"):
        main([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf" / "constitutions").glob("*.yaml")))
def test_every_shipped_constitution_has_prompts_enough_under_the_demo_recipe(name, shipped_prompts):
    lines = check(ROOT / "conf" / "constitutions" / f"{name}.yaml", [shipped_prompts], RECIPES / "demo.yaml")
    assert not [line for line in lines if line.startswith("warning")]


@pytest.fixture(scope="module")
def shipped_prompts(tmp_path_factory):
    """`prompts.jsonl` as `data.dvc` pins it, out of the embedded remote."""
    store = ROOT / "dvc_store" / "files" / "md5"
    pinned = yaml.safe_load((ROOT / "data.dvc").read_text(encoding="utf-8"))["outs"][0]["md5"]
    files = {row["relpath"]: row["md5"] for row in json.loads((store / pinned[:2] / pinned[2:]).read_text())}
    md5 = files["prompts.jsonl"]
    return Path(shutil.copy(store / md5[:2] / md5[2:], tmp_path_factory.mktemp("shipped") / "prompts.jsonl"))
