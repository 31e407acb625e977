"""Where the project's files are. Everything a run writes goes below one folder, `storage/` unless ALIGNMENT_STORAGE says."""

import os
from pathlib import Path

from alignment.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
RECIPES = PROJECT / "conf" / "recipes"


def storage() -> Path:
    """Root of artifacts, handles, and the MLflow database."""
    return Path(os.environ.get("ALIGNMENT_STORAGE", PROJECT / "storage")).resolve()


def data_root() -> Path:
    """The folder that holds `data/`, `data.dvc` and `.dvc/`: the project, unless ALIGNMENT_DATA_ROOT says otherwise."""
    return Path(os.environ.get("ALIGNMENT_DATA_ROOT", PROJECT)).resolve()


def constitutions() -> Path:
    """The folder of constitutions, one YAML each: conf/constitutions, unless ALIGNMENT_CONSTITUTIONS names another.

    Raises:
        UserError: no such folder, or no YAML in it; an empty list of partitions would be an error nobody understands.
    """
    folder = Path(os.environ.get("ALIGNMENT_CONSTITUTIONS", PROJECT / "conf" / "constitutions")).resolve()
    if not any(folder.glob("*.yaml")):
        raise UserError(f"{folder}: holds no constitution. Remedy: let ALIGNMENT_CONSTITUTIONS name a folder with YAML files.")
    return folder


def recipe_path() -> Path:
    """The recipe in force: ALIGNMENT_RECIPE is a name in conf/recipes or a path; demo unless set."""
    name = os.environ.get("ALIGNMENT_RECIPE", "demo")
    return Path(name).resolve() if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"


def answers() -> Path:
    """Answers of endpoints, kept for all runs: none is paid for twice."""
    return storage() / "answers"
