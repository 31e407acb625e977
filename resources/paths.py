"""Where the project's files are. Everything a run writes goes below one folder, `storage/` unless ALIGNMENT_STORAGE says."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
CONSTITUTIONS = PROJECT / "conf" / "constitutions"
RECIPES = PROJECT / "conf" / "recipes"


def storage() -> Path:
    """Root of artifacts, handles, and the MLflow database."""
    return Path(os.environ.get("ALIGNMENT_STORAGE", PROJECT / "storage")).resolve()


def data_root() -> Path:
    """The folder that holds `data/`, `data.dvc` and `.dvc/`: the project, unless ALIGNMENT_DATA_ROOT says otherwise."""
    return Path(os.environ.get("ALIGNMENT_DATA_ROOT", PROJECT)).resolve()


def recipe_path() -> Path:
    """The recipe in force: ALIGNMENT_RECIPE is a name in conf/recipes or a path; demo unless set."""
    name = os.environ.get("ALIGNMENT_RECIPE", "demo")
    return Path(name).resolve() if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"


def answers() -> Path:
    """Answers of endpoints, kept for all runs: none is paid for twice."""
    return storage() / "answers"
