"""What the tests of the orchestration half share: a sandbox for a whole pipeline, and the environment of this process."""

import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

PROJECT = Path(__file__).resolve().parents[1]

# `assets.settings` and `dagster_project.resources` read these when they are imported. Nothing here may reach the
# storage, the Dagster history or the MLflow server of the person who runs the tests.
_SCRATCH = tempfile.TemporaryDirectory(prefix="alignment-tests-")
for _name in (
    "DAGSTER_HOME",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT",
    "ALIGNMENT_CONSTITUTIONS",
    "ALIGNMENT_DATA_ROOT",
    "ALIGNMENT_DVC_REMOTE",
    "ALIGNMENT_MAX_CONCURRENT",
    "ALIGNMENT_METHODS",
    "DAGSTER_UI_URL",
    "MLFLOW_UI_URL",
):
    os.environ.pop(_name, None)
os.environ.update(
    ALIGNMENT_RECIPE="tiny",
    ALIGNMENT_STORAGE=str(Path(_SCRATCH.name) / "storage"),
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

# The commands of `make demo` one after the other in one process, so that the heavy imports are paid for once.
DEMO_RUNS = """
import json, sys
from dagster_project import demo
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["demo", *arguments]
    demo.main()
"""

# Some of the job's assets for the constitution `general`, the way `make demo` materializes all of them.
PARTIAL_RUN = """
import json, sys
import dagster as dg
from dagster_project.demo import run_alignment
keys, run_config = json.loads(sys.argv[1])
with dg.DagsterInstance.get() as instance:
    result = run_alignment(instance, "general", run_config, keys)
sys.exit(0 if result.success else 1)
"""

# The same for any constitution and in one process, so that the heavy imports are paid for once.
IN_PROCESS = """
import json, sys
import dagster as dg
from dagster_project.definitions import defs
keys, run_config, constitution = json.loads(sys.argv[1])
with dg.DagsterInstance.get() as instance:
    defs.resolve_job_def("alignment").execute_in_process(
        run_config=run_config,
        instance=instance,
        partition_key=constitution,
        asset_selection=[dg.AssetKey(key.split("/")) for key in keys],
    )
"""

# The commands of `make cai-demo` one after the other.
CAI_DEMO_RUNS = """
import json, sys
from dagster_project import cai_demo
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["cai_demo", *arguments]
    cai_demo.main()
"""


@dataclass(frozen=True)
class Started:
    """A job in a subprocess, and the file with its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def finish(self, timeout: float = 800) -> str:
        """Wait until it ends, assert that it succeeded, and return what it printed."""
        try:
            code = self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
        assert code == 0, self.text()[-6000:]
        return self.text()


@dataclass(frozen=True)
class Sandbox:
    """A pipeline of its own: storage, Dagster home and data in temporary folders; jobs run in subprocesses."""

    folder: Path
    data: Path
    settings: Mapping[str, str] = field(default_factory=dict)  # of the environment

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    @property
    def home(self) -> Path:
        return self.folder / "dagster_home"

    def start_demo(self, configs: Sequence[Mapping[str, Any] | None]) -> Started:
        """`python -m dagster_project.demo` once per run configuration (None: the recipe as it is)."""
        commands = []
        for number, config in enumerate(configs):
            path = self.folder / f"run_{number}.yaml"
            path.write_text(json.dumps(config), encoding="utf-8")
            commands.append(["--config", str(path)] if config else [])
        return self._start(DEMO_RUNS, json.dumps(commands))

    def start_assets(self, keys: Sequence[str], config: Mapping[str, Any]) -> Started:
        """Only some of the job's assets."""
        return self._start(PARTIAL_RUN, json.dumps([keys, config]))

    def start_in_process(self, keys: Sequence[str], config: Mapping[str, Any], constitution: str) -> Started:
        """Some of the job's assets for a constitution, all in one process."""
        return self._start(IN_PROCESS, json.dumps([keys, config, constitution]))

    def start_cai_demo(self, *commands: Sequence[str]) -> Started:
        """`python -m dagster_project.cai_demo` once per list of arguments."""
        return self._start(CAI_DEMO_RUNS, json.dumps(commands))

    def _start(self, script: str, argument: str) -> Started:
        return self.start_command(sys.executable, "-c", script, argument)

    def start_command(self, *command: str) -> Started:
        """Any command in this pipeline's environment."""
        self.home.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", self.home)
        log = self.folder / f"output_{len(list(self.folder.glob('output_*')))}.log"
        env = {
            **os.environ,
            "ALIGNMENT_STORAGE": str(self.storage),
            "ALIGNMENT_DATA_ROOT": str(self.data),
            "DAGSTER_HOME": str(self.home),
            "PYTHONPATH": str(PROJECT),
            **self.settings,
        }
        with log.open("wb") as file:  # in the folder of the data, as under `make`
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=self.data)
        return Started(process, log)

    @contextmanager
    def instance(self) -> Iterator[Any]:
        """The Dagster instance that the jobs ran in."""
        import dagster as dg

        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            yield instance

    def mlflow(self) -> Any:
        """A client of the MLflow database that the jobs logged to."""
        import mlflow

        uri = f"sqlite:///{self.storage / 'mlflow.db'}"
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)

    def mlflow_runs(self, tags: Mapping[str, str]) -> list[Any]:
        """The MLflow runs with these tags, oldest first."""
        client = self.mlflow()
        experiment = client.get_experiment_by_name("alignment").experiment_id
        runs = client.search_runs([experiment], order_by=["attributes.start_time ASC"], max_results=1000)
        return [run for run in runs if tags.items() <= run.data.tags.items()]

    def artifacts(self, asset: str) -> list[Path]:
        """The published artifact folders of an asset, oldest first."""
        return sorted((self.storage / "artifacts" / asset).glob("*"), key=lambda path: path.stat().st_mtime)


# The files that take longest, longest first. `make test` keeps this order: a worker that began one of them last would work on
# alone, long after the other had ended.
LONGEST = (
    "test_pipeline",
    "test_method_settings",
    "test_resume",
    "test_endpoint",
    "test_model_sources",
    "test_architecture",
    "test_critique",
    "test_base_model",
    "test_scorer",
    "test_ai_feedback_asset",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of `LONGEST`, then the others as they were found."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def _nothing_loaded_is_garbage() -> None:
    """Trainers collect garbage again and again; among a million objects of imported libraries that takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A database with MLflow's tables and nothing in them, to be copied. Creating one takes seconds: all workers share it."""
    import mlflow

    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    path = root / "mlflow_empty.db"
    with FileLock(root / "mlflow_empty.lock"):
        if not path.exists():
            new = path.with_suffix(".new")
            mlflow.MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments()
            new.rename(path)
    return path


@pytest.fixture(scope="session")
def fresh_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data as in a fresh clone: pinned by `data.dvc`, in the embedded remote, and not yet pulled."""
    root = tmp_path_factory.mktemp("data_root")
    shutil.copytree(PROJECT / "dvc_store", root / "dvc_store")
    shutil.copy(PROJECT / "data.dvc", root)
    config = (PROJECT / ".dvc" / "config").read_text(encoding="utf-8")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text(config.replace("[core]", "[core]\n    no_scm = true"), encoding="utf-8")
    return root


@pytest.fixture
def pulled(tmp_path: Path, fresh_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's data, pulled; the process works beside it, as under `make`."""
    from resources.dvc_data import DvcData

    root = Path(shutil.copytree(fresh_data, tmp_path / "root", ignore=shutil.ignore_patterns("data", "tmp", "cache")))
    monkeypatch.chdir(root)
    DvcData(root=str(root)).checkout(["prompts.jsonl"])
    return root


@pytest.fixture
def resources(tmp_path: Path, fresh_data: Path, empty_database: Path) -> dict[str, Any]:
    """What assets need: the project's data, and everything else in the test's folder."""
    from resources.artifacts import ArtifactStore
    from resources.dvc_data import DvcData
    from resources.handle_io import HandleIOManager
    from resources.tracking import MlflowTracking

    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return {
        "store": ArtifactStore(root=str(tmp_path / "artifacts")),
        "io_manager": HandleIOManager(root=str(tmp_path / "handles")),
        "dvc": DvcData(root=str(fresh_data)),
        "tracking": MlflowTracking(
            tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
            artifact_root=str(tmp_path / "mlartifacts"),
            lock_folder=str(tmp_path / "locks"),
        ),
    }


@pytest.fixture(scope="session")
def new_sandbox(tmp_path_factory: pytest.TempPathFactory, fresh_data: Path, empty_database: Path) -> Callable[..., Sandbox]:
    """A function that makes a sandbox by name; further arguments are settings of its environment.

    Its MLflow database is there and empty, unless `fresh`: then the pipeline creates it, as after `make setup`.
    """

    def make(name: str, *, fresh: bool = False, **settings: str) -> Sandbox:
        sandbox = Sandbox(tmp_path_factory.mktemp(name), fresh_data, settings)
        if not fresh:
            sandbox.storage.mkdir()
            shutil.copy(empty_database, sandbox.storage / "mlflow.db")
        return sandbox

    return make


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.ForkServerContext:
    """For tests of several processes at once: new ones start within milliseconds, so that they really meet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "resources.artifacts", "resources.tracking"])
    return context


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs Python code in a new process, with this project on its path."""

    def run(script: str, *arguments: str, cwd: Path = PROJECT, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, "PYTHONPATH": str(cwd), **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def tokenizers_with_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tokenizer comes with code of its own, as far as `AutoTokenizer` can tell: it is loaded where that is trusted only."""
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained

    def from_pretrained(*args: Any, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        if not trust_remote_code:
            raise ValueError("Please pass the argument `trust_remote_code=True`")
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
