"""What the tests of assets share: an asset's own computation without what `materialize` does around it, and what that reads."""

import inspect
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from alignment.datasets import write_jsonl
from alignment.evaluation import Heldout
from alignment.handles import Checkpoint, Handle, PreferenceDataset, PromptSet, RewardModel, SftDataset, SftReport
from alignment.records import Conversation, Message, Problem, Prompt
from assets.stage import Stage
from resources.paths import PROJECT

KINDS: dict[str, type[Handle]] = {
    "base_model": Checkpoint,
    "sft_dataset": SftDataset,
    "human_preferences": PreferenceDataset,
    "prompts": PromptSet,
    "sft_checkpoint": Checkpoint,
    "human_reward_model": RewardModel,
    "constitutional_preference_pairs": PreferenceDataset,
    "ai_feedback": PreferenceDataset,
    "reward_model": RewardModel,
    "evaluator": RewardModel,
    "aligned_policy": Checkpoint,
    "sft_report": SftReport,
}


@pytest.fixture
def cook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A constitution beside the shipped ones that learns from human pairs of domains of its own."""
    folder = Path(shutil.copytree(PROJECT / "conf" / "constitutions", tmp_path / "constitutions"))
    text = (folder / "general.yaml").read_text(encoding="utf-8")
    (folder / "cook.yaml").write_text(f"preference_domains: [everyday, cooking]\n{text}", encoding="utf-8")
    monkeypatch.setenv("ALIGNMENT_CONSTITUTIONS", str(folder))
    return "cook"


@pytest.fixture
def stage_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """A function that returns an asset's `Stage` under a constitution; further arguments are its configuration.

    The artifacts of its inputs lie in the test's folder, each in the folder of its asset, and their models in `model/` there.
    """
    store = SimpleNamespace(
        path=lambda handle: tmp_path / handle.asset,
        model_files=lambda handle: tmp_path / handle.asset / "model",
        record=lambda asset, fingerprint: SimpleNamespace(seconds=3.0, peak_memory_gb=0.5),
    )

    def of(asset: dg.AssetsDefinition, partition: str = "general", **config: Any) -> Stage:
        body = asset.op.compute_fn.decorated_fn
        monkeypatch.setattr(sys.modules[body.__module__], "materialize", lambda context, stage, tools, *, force: stage())
        resources = {"store": store, "tracking": None, "dvc": None}
        context = SimpleNamespace(
            has_partition_key=True, partition_key=partition, assets_def=asset, resources=SimpleNamespace(**resources)
        )
        asked = inspect.signature(body).parameters
        given = {name: handle_of(key) for name, key in asset.keys_by_input_name.items()}
        given |= {name: resource for name, resource in resources.items() if name in asked}
        return body(context, asked["config"].annotation(**config), **given)

    return of


def handle_of(key: dg.AssetKey) -> Handle:
    return KINDS[key.path[0]](asset=key.to_user_string(), fingerprint="0" * 64, mlflow_run_id="0")


@pytest.fixture
def heldout(tmp_path: Path) -> Heldout:
    """What models of the constitution `general` are measured on; it lies in its assets' folders, beside what they are not."""
    talk = Conversation(id="c", messages=(Message(role="user", content="Hi"), Message(role="assistant", content="Hello")))
    ours = Heldout(
        prompts=(Prompt(id="a", prompt="Boil it.", tags=("general",)),),
        demonstrations=(talk,),
        problems=(Problem(id="q", prompt="One and one?", answer="2"),),
    )
    rows = {
        "prompts/heldout": [*ours.prompts, Prompt(id="b", prompt="Sort it.", tags=("coding",))],
        "prompts/problems_heldout": ours.problems,
        "sft_dataset/heldout": ours.demonstrations,
    }
    for name, records in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    return ours
