"""Where the project's files are. Everything a run writes goes below one folder, `storage/` unless ALIGNMENT_STORAGE says."""

import os
from pathlib import Path
from urllib.parse import urlsplit

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


def tracking_uri() -> str:
    """MLflow's database or server: a SQLite file in the storage, unless MLFLOW_TRACKING_URI says otherwise."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage() / 'mlflow.db'}"


def is_database(uri: str) -> bool:
    """Whether a tracking URI is a database, which needs a server of ours to be looked at; else it is somebody's server."""
    return uri.partition(":")[0].partition("+")[0] in {"sqlite", "postgresql", "mysql", "mssql"}


def mlflow_ui(own: str = "http://127.0.0.1:5000") -> str:
    """Address of MLflow's UI: MLFLOW_UI_URL, the tracking server's, or `own`, where `make ui` starts one for a database. It is
    shown and recorded, and so without user and password."""
    uri = tracking_uri()
    address = urlsplit(os.environ.get("MLFLOW_UI_URL") or (own if is_database(uri) else uri.rstrip("/")))
    return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()


def artifact_root() -> str:
    """Where MLflow's artifacts go beside a database: `mlartifacts/` in the storage, or MLFLOW_DEFAULT_ARTIFACT_ROOT (a folder,
    or a URI such as s3://bucket/folder)."""
    return os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or str(storage() / "mlartifacts")


def answers() -> Path:
    """Answers of endpoints, kept for all runs: none is paid for twice."""
    return storage() / "answers"
