"""One function picks the resources, from the environment or the defaults of a single machine."""

import os
from typing import Any

from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.paths import artifact_root, data_root, mlflow_ui, storage, tracking_uri
from resources.tracking import MlflowTracking


def resources() -> dict[str, Any]:
    """Everything assets need, below `storage/` unless MLFLOW_TRACKING_URI and friends say otherwise."""
    root = storage()
    return {
        "store": ArtifactStore(root=str(root / "artifacts")),
        "io_manager": HandleIOManager(root=str(root / "handles")),
        "dvc": DvcData(root=str(data_root()), push_to=os.environ.get("ALIGNMENT_DVC_REMOTE", "")),
        "tracking": MlflowTracking(
            tracking_uri=tracking_uri(),
            artifact_root=artifact_root(),
            lock_folder=str(root / "locks"),
            ui_url=mlflow_ui(),
        ),
    }
