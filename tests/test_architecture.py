"""What must stay true of the code as a whole: who imports whom, what loading the definitions costs."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.recipes import Recipe, RecipeError

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HEAVY = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "mlflow",
    "dvc",
    "datasets",
    "pandas",
    "matplotlib",
    "pyarrow",
    "openai",
]


def test_import_contracts_hold():
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_setting_of_whoever_runs_the_tests_reaches_them():
    sources = [path for package in ("assets", "dagster_project", "resources") for path in (PROJECT / package).glob("*.py")]
    read = {name for path in sources for name in re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text(encoding="utf-8"))}
    assert {"ALIGNMENT_METHODS", "ALIGNMENT_STORAGE", "MLFLOW_DEFAULT_ARTIFACT_ROOT"} <= read
    removed_or_set = set(re.findall(r"\b[A-Z_]+\b", (PROJECT / "tests" / "conftest.py").read_text(encoding="utf-8")))
    assert read - removed_or_set == set()


def test_loading_the_definitions_imports_nothing_heavy(python):
    script = "import sys, dagster_project.definitions; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & set(HEAVY) == set()


def test_what_steps_are_forked_from_has_done_the_heavy_work(python):
    """Python skips a preloaded module that fails to import without a word, and every step would be seconds slower."""
    done = python("""
import dagster_project.preload, gc, sys, time
import dagster as dg
from dagster_project.jobs import alignment
begun = time.process_time()
dg.reconstructable(alignment).get_definition()
print(time.process_time() - begun, gc.get_freeze_count(), *sys.modules)
""")
    assert done.returncode == 0, done.stderr
    seconds, frozen, *modules = done.stdout.split()
    assert {"torch", "trl", "peft", "datasets", "mlflow.store.tracking.sqlalchemy_store"} <= set(modules)
    assert {"transformers.trainer", "transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer"} <= set(modules)
    assert {"matplotlib.backends.backend_agg", "upath.core", "dotenv"} <= set(modules)
    assert int(frozen) > 100_000, "every step looks for garbage among what was loaded before it began"
    assert float(seconds) < 0.1, "the job is built again in every step"


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_definitions_validate_in_three_seconds_of_cpu_time(tmp_path):
    """Or in three and a half times what `import dagster` takes, as machines may be slow: two and a half are usual, and Dagster
    needs two of them for a project with a single asset."""
    imports, validations = [], []
    for _ in range(2):  # in turn, and the quicker of each counts: other processes only ever slow one down
        start = cpu_seconds_of_children()
        subprocess.run([sys.executable, "-c", "import dagster"], check=True, timeout=120)
        before = cpu_seconds_of_children()
        done = subprocess.run(
            [BIN / "dagster", "definitions", "validate", "-w", PROJECT / "workspace.yaml"],
            cwd=tmp_path,  # the workspace file works from any folder
            env={**os.environ, "DAGSTER_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        imports.append(before - start)
        validations.append(cpu_seconds_of_children() - before)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Validation successful for code location alignment" in done.stdout + done.stderr
    assert min(validations) <= max(3, 3.5 * min(imports)), (validations, imports)


def test_the_library_imports_without_orchestrator_tracker_and_data_versioning(python):
    script = """
import importlib, pkgutil, sys
sys.modules.update({name: None for name in ("dagster", "mlflow", "dvc")})
import alignment
names = [m.name for m in pkgutil.walk_packages(alignment.__path__, "alignment.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""
    done = python(script)
    assert done.returncode == 0, done.stderr
    files = [p.relative_to(PROJECT) for p in (PROJECT / "alignment").rglob("*.py") if p.name != "__init__.py"]
    assert {".".join(p.with_suffix("").parts) for p in files} <= set(done.stdout.split())


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (PROJECT / "conf" / "recipes").glob("*.yaml")))
def test_definitions_load_under_every_recipe(python, recipe):
    script = "from dagster_project.definitions import defs; print(len(list(defs.resolve_asset_graph().get_all_asset_keys())))"
    done = python(script, ALIGNMENT_RECIPE=recipe)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 12


def test_an_unknown_recipe_key_is_refused_when_the_definitions_load(python, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("sft_checkpoint:\n  optim: {epoch: 3}\n", encoding="utf-8")
    done = python("import dagster_project.definitions", ALIGNMENT_RECIPE=str(recipe))
    assert done.returncode != 0
    assert f"{recipe}: key 'sft_checkpoint.optim.epoch': is not a known key" in done.stderr


def test_a_misspelt_stage_in_a_recipe_is_refused_when_the_definitions_load(python, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("sft_chekpoint:\n  max_length: 64\n", encoding="utf-8")
    done = python("import dagster_project.definitions", ALIGNMENT_RECIPE=str(recipe))
    assert done.returncode != 0
    assert "sft_chekpoint" in done.stderr


DATA_SETS = ("sft_dataset", "human_preferences", "prompts")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        *[
            ({stage: {"heldout_fraction": 0.3}}, rf"heldout_fraction differs between \{{.*'{stage}': 0\.3.*")
            for stage in DATA_SETS
        ],
        ({"reward_model": {"optim": {"seed": 1}}}, r"reward_model and evaluator have the same optim\.seed, 1.*"),
    ],
    ids=[*DATA_SETS, "seed"],
)
def test_stages_of_a_recipe_that_do_not_go_together_are_refused(monkeypatch, values, says):
    import dagster_project.definitions  # noqa: F401  whose assets are the known stages
    from assets import settings

    def check(values):
        monkeypatch.setattr(settings, "RECIPE", Recipe(Path("mine.yaml"), values))
        settings.check_recipe()

    with pytest.raises(RecipeError, match=rf"^mine\.yaml: {says}Remedy: give"):
        check(values)
    check({stage: {"heldout_fraction": 0.3} for stage in DATA_SETS})


def test_a_sixth_constitution_needs_no_python(python, tmp_path):
    for package in ("alignment", "resources", "assets", "conf"):
        shutil.copytree(PROJECT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    general = tmp_path / "conf" / "constitutions" / "general.yaml"
    shutil.copy(general, general.with_name("legal.yaml"))
    done = python("from assets.settings import PARTITIONS; print(*PARTITIONS.get_partition_keys())", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shipped = [p.stem for p in (PROJECT / "conf" / "constitutions").glob("*.yaml")]
    assert done.stdout.split() == sorted([*shipped, "legal"])
