"""Fingerprints: everything that decides a result changes them, where and how it runs does not."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

import alignment
from alignment.ai_feedback import AiFeedbackConfig
from alignment.constitutions import Constitution, CritiqueExample, Principle
from alignment.critic import AnswererSettings
from alignment.critique import CritiqueConfig
from alignment.critique_demo import CritiqueDemoConfig
from alignment.fingerprint import fingerprint, identity
from alignment.methods import METHODS
from alignment.methods.dpo import DpoConfig
from alignment.models import Config
from alignment.promotion import Rule

# What may differ between two machines that compute the same thing. Written out here on purpose: a field that is marked
# as layout by mistake would let two different results share one address.
LAYOUT = {
    ("LoadSettings", "attention"),
    ("OptimSettings", "micro_batch_size"),
    ("OptimSettings", "gradient_checkpointing"),
    ("OptimSettings", "save_every"),
    ("OptimSettings", "log_every"),
    ("SamplingSettings", "batch_size"),
    ("FilterSettings", "min_share_kept"),
    ("CritiqueConfig", "chunk"),
    ("CritiqueConfig", "score_batch_size"),
    ("CritiqueDemoConfig", "chunk"),
    ("CritiqueDemoConfig", "score_batch_size"),
    ("AiFeedbackConfig", "chunk"),
    *(("AnswererSettings", name) for name in ("base_url", "api_key_env", "limit_key", "concurrency", "timeout", "retries")),
    *(("AnswererSettings", name) for name in ("max_retry_wait", "max_tokens_budget", "max_cost")),
    *(("AnswererSettings", name) for name in ("price_prompt", "price_completion")),
    ("RewardConfig", "score_batch_size"),
    ("RewardMixConfig", "score_batch_size"),
    ("EvaluatorConfig", "score_batch_size"),
    *(("ReportConfig", name) for name in ("sampling_batch_size", "score_batch_size")),
    ("SftReportConfig", "score_batch_size"),
    *(("PpoConfig", name) for name in ("share_base", "reuse_frozen_layers", "micro_batch_size")),
    *(("PpoConfig", name) for name in ("score_batch_size", "save_every")),
    *((method, "sample_batch_size") for method in ("GroupRlConfig", "GrpoConfig", "RlooConfig")),
    *((method, "score_batch_size") for method in ("GroupRlConfig", "GrpoConfig", "RlooConfig")),
}
# Settings without effect, or with a wrong one, in a stage, which refuses any other value than its own.
WITHOUT_DROPOUT = {"RewardConfig", "RewardMixConfig", "PairsConfig", "DpoConfig", "KtoConfig", "OrpoConfig", "PpoConfig"}
WITHOUT_DROPOUT |= {"EvaluatorConfig", "GroupRlConfig", "GrpoConfig", "RlooConfig"}
FIXED = {(name, "lora.dropout") for name in WITHOUT_DROPOUT}
FIXED |= {("PpoConfig", "sampling.top_k"), ("PpoConfig", "sampling.repetition_penalty")}
PRINCIPLE = Principle(id="honest", text="Be honest.")
ANSWERER = AnswererSettings(model="m", price_prompt=1.0)  # fit to be an endpoint, and to have a budget
WITHOUT_DEFAULTS = {
    Principle: PRINCIPLE,
    CritiqueExample: CritiqueExample(prompt="p", response="r", critique="c", revision="v"),
    Constitution: Constitution(name="general", description="d", prompt_tags=("general",), principles=(PRINCIPLE,), text="t"),
    AnswererSettings: ANSWERER,
    CritiqueConfig: CritiqueConfig(sampler=ANSWERER, critic=ANSWERER),
    CritiqueDemoConfig: CritiqueDemoConfig(sampler=ANSWERER, critic=ANSWERER),
    AiFeedbackConfig: AiFeedbackConfig(policy=ANSWERER, judge=ANSWERER),
    Rule: Rule(name="length", passed=True, reason="1 against 1"),
    DpoConfig: DpoConfig(loss_type="robust", label_smoothing=0.1),  # the loss that has a place for it
}


def config_classes():
    for module in pkgutil.walk_packages(alignment.__path__, "alignment."):
        importlib.import_module(module.name)

    def below(cls):
        return {c for sub in cls.__subclasses__() for c in {sub} | below(sub)}

    return sorted((c for c in below(Config) if c.__module__.startswith("alignment")), key=lambda c: c.__name__)


def example(cls):
    return WITHOUT_DEFAULTS[cls] if cls in WITHOUT_DEFAULTS else cls()


def fields(config, path=()):
    """Every leaf of a configuration: (path to it, class it stands in, its field)."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from fields(value, (*path, name))
        else:
            yield (*path, name), type(config), field


def changed(config, path, field):
    """The configuration with another, valid value in one place."""
    values = config.model_dump()
    place = values
    for name in path[:-1]:
        place = place[name]
    for candidate in other_values(place[path[-1]], field.annotation):
        place[path[-1]] = candidate
        try:
            new = type(config).model_validate(values)
        except ValidationError:
            continue
        if new != config:
            return new
    raise AssertionError(f"no other valid value found for {type(config).__name__}.{'.'.join(path)}: extend other_values")


def other_values(value, annotation):
    if get_origin(annotation) is Literal:
        return [v for v in get_args(annotation) if v != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value + 2, value * 2, value // 2]
    if isinstance(value, float):
        return [value / 2, value + 0.01]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, list | tuple):
        halved = [[v / 2 for v in value]] if value and all(isinstance(v, float) for v in value) else []
        principle = {"id": "second", "text": "Be kind."}
        worked = {"prompt": "p", "response": "r", "critique": "c", "revision": "v"}
        return [[*value, "x"], [*value, principle], [*value, worked], *halved]
    if value is None:
        return ["x", ["x"]]
    return []


CASES = [
    pytest.param(cls, path, owner, id=f"{cls.__name__}-{'.'.join(path)}")
    for cls in config_classes()
    for path, owner, _ in fields(example(cls))
    if (cls.__name__, ".".join(path)) not in FIXED
]


def address(config, **kwargs):
    given = {"asset": "a", "code_version": "1", "inputs": {"base": "1", "data": "2"}, "constitution": "text"}
    return fingerprint(**{**given, **kwargs}, config=config)


def test_the_walk_reaches_nested_settings_of_every_stage():
    names = {cls.__name__ for cls in config_classes()}
    assert {"SftConfig", "RewardConfig", "CritiqueConfig", "DpoConfig", "ReportConfig", "GateConfig"} <= names
    assert {method.config.__name__ for method in METHODS.values()} <= names
    assert len(CASES) > 120
    assert {(o.__name__, p[-1]) for _, p, o in (c.values for c in CASES)} >= LAYOUT


@pytest.mark.parametrize(("cls", "path", "owner"), CASES)
def test_a_field_changes_the_fingerprint_unless_it_is_layout(cls, path, owner):
    config = example(cls)
    field = owner.model_fields[path[-1]]
    same = address(config) == address(changed(config, path, field))
    assert same == ((owner.__name__, path[-1]) in LAYOUT)


def test_a_setting_that_a_stage_does_not_have_has_no_other_value():
    places = [(cls, path, owner) for cls in config_classes() for path, owner, _ in fields(example(cls))]
    refused = [place for place in places if (place[0].__name__, ".".join(place[1])) in FIXED]
    assert len(refused) == len(FIXED)
    for cls, path, owner in refused:
        with pytest.raises(AssertionError, match="no other valid value"):
            changed(example(cls), path, owner.model_fields[path[-1]])


CONFIG = example(next(c for c in config_classes() if c.__name__ == "SftConfig"))


@pytest.mark.parametrize(
    "other",
    [
        {"asset": "b"},
        {"code_version": "2"},
        {"inputs": {"base": "1", "data": "3"}},
        {"inputs": {"base": "2", "data": "1"}},
        {"inputs": {"base": "1"}},
        {"inputs": {"base": "1", "data": "2", "more": ""}},
        {"constitution": "text "},
        {"constitution": ""},
        {"constitution": None},
    ],
    ids=str,
)
def test_everything_else_that_decides_a_result_changes_the_fingerprint(other):
    assert address(CONFIG, **other) != address(CONFIG)


def test_no_two_different_things_share_a_fingerprint():
    seen = [address(CONFIG), *(address(CONFIG, constitution=c) for c in (None, "", "None", "null"))]
    seen += [address(CONFIG, inputs=i) for i in ({}, {"base": "1,2"}, {"base": '1","data":"2'}, {"a": "", "b": ""})]
    assert len(set(seen)) == len(seen)


def test_the_order_of_keys_does_not_matter():
    assert address(CONFIG, inputs={"data": "2", "base": "1"}) == address(CONFIG)
    turned = dict(reversed(CONFIG.model_dump().items()))
    assert address(type(CONFIG).model_validate(turned)) == address(CONFIG)


def test_a_default_that_is_spelled_out_is_the_same_computation():
    spelled_out = type(CONFIG).model_validate({"optim": {**CONFIG.optim.model_dump(), "epochs": 1}})  # 1 for 1.0
    assert address(spelled_out) == address(CONFIG)


def test_layout_is_left_out_at_every_depth():
    assert "micro_batch_size" in CONFIG.optim.model_dump()
    assert "micro_batch_size" not in identity(CONFIG)["optim"]
    assert identity(CONFIG)["optim"]["batch_size"] == CONFIG.optim.batch_size
    assert "attention" not in identity(CONFIG)["load"]


def test_another_process_finds_the_same_address():
    code = (
        "from alignment.sft import SftConfig; from alignment.fingerprint import fingerprint;"
        "print(fingerprint(asset='a', code_version='1', config=SftConfig(), inputs={'x': 'y'}, constitution='ü'))"
    )
    here = fingerprint(asset="a", code_version="1", config=CONFIG, inputs={"x": "y"}, constitution="ü")
    root = Path(__file__).parents[2]
    env = {"PYTHONPATH": str(root), "PYTHONHASHSEED": "123", "PATH": ""}
    there = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert len(here) == 64
    assert int(here, 16) >= 0
