"""The IO manager: an asset's value is its handle, a small JSON file per asset and partition."""

import os
from pathlib import Path

import dagster as dg

from alignment.handles import AnyHandle, Handle, parse_handle


class HandleIOManager(dg.ConfigurableIOManager):
    """Writes handles to `<root>/<asset>[/<partition>].json`, atomically, and reads them back as their own class."""

    root: str

    def handle_output(self, context: dg.OutputContext, obj: Handle) -> None:
        if not isinstance(obj, Handle):
            raise TypeError(f"{context.asset_key.to_user_string()} must return a handle, got {type(obj).__name__}")
        partition = context.asset_partition_key if context.has_asset_partitions else None
        path = self._path(context.asset_key, partition)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(obj.model_dump_json(indent=2), encoding="utf-8")
        os.replace(draft, path)

    def load_input(self, context: dg.InputContext) -> AnyHandle:
        partition = context.asset_partition_key if context.has_asset_partitions else None
        path = self._path(context.asset_key, partition)
        if not path.exists():
            where = f" for partition {partition!r}" if partition else ""
            raise dg.Failure(
                f"{context.asset_key.to_user_string()} has not been materialized{where} ({path} is missing). "
                "Remedy: materialize it first, or run the whole job.",
                allow_retries=False,
            )
        return parse_handle(path.read_text(encoding="utf-8"))

    def _path(self, key: dg.AssetKey, partition: str | None) -> Path:
        folder = Path(self.root).joinpath(*key.path)
        return folder / f"{partition}.json" if partition else folder.with_suffix(".json")
