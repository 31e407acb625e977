"""Who answers: the checkpoint, the base under it, or an endpoint; a model that two roles share is in memory once."""

from types import SimpleNamespace

import pytest

from alignment.critic import AnswererSettings, LocalAnswerer
from alignment.critique import CritiqueConfig
from alignment.errors import UserError
from alignment.handles import Checkpoint, RewardModel
from alignment.models import LoadSettings, ModelFiles
from alignment.tiny_model import build_tiny_model
from assets.answerers import answerers, who_revises
from resources.endpoint import EndpointAnswerer

LOCAL, BASE = AnswererSettings(), AnswererSettings(source="base_model")
ENDPOINT = AnswererSettings(kind="endpoint", model="m")


def handle(fingerprint, **kwargs):
    return Checkpoint(asset="sft_checkpoint", fingerprint=fingerprint, mlflow_run_id="r", **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "llama")
    return SimpleNamespace(model_files=lambda handle: ModelFiles(folder))


def chosen(store, tmp_path, checkpoint=None, **roles):
    checkpoint = checkpoint or handle("sft", adapter_of=handle("base"))
    return answerers(roles, checkpoint, store, LoadSettings(dtype="float32"), tmp_path)


def test_roles_that_share_a_model_share_it_in_memory(store, tmp_path):
    who = chosen(store, tmp_path, sampler=LOCAL, critic=LOCAL)
    assert who["sampler"] is who["critic"]
    assert isinstance(who["critic"], LocalAnswerer)


def test_an_answerer_is_identified_by_what_it_is(store, tmp_path):
    who = chosen(store, tmp_path, sampler=LOCAL, critic=BASE, judge=ENDPOINT)
    assert [who[role].identity for role in ("sampler", "critic", "judge")] == ["sft", "base", "endpoint:m"]
    assert isinstance(who["judge"], EndpointAnswerer)


def test_the_base_of_a_model_fine_tuned_in_full_cannot_be_told(store, tmp_path):
    with pytest.raises(UserError, match=r"source: base_model cannot be told.*Remedy"):
        chosen(store, tmp_path, checkpoint=handle("full"), critic=BASE)


def test_a_tokenizer_with_code_of_its_own_is_trusted_where_the_settings_say_so(store, tmp_path, tokenizers_with_code):
    config = CritiqueConfig(load=LoadSettings(dtype="float32", trust_remote_code=True))
    checkpoint = handle("sft", adapter_of=handle("base"))
    reward_model = RewardModel(asset="human_reward_model", fingerprint="reward", mlflow_run_id="r")
    sampler, _, _ = who_revises(config, checkpoint, reward_model, store, tmp_path)
    assert sampler.identity == "sft"
    with pytest.raises(ValueError, match="trust_remote_code"):
        chosen(store, tmp_path, critic=LOCAL)
