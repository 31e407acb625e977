"""DVC-versioned data: what `data.dvc` pins, whether `data/` is exactly that, and how to get it.

The md5 in `data.dvc` is the version of all of `data/`; the manifest behind it gives the md5 of each file, so that an
asset depends on the files it reads and not on its neighbours.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import yaml
from filelock import FileLock

from alignment.errors import UserError


class DataVersionError(UserError):
    """`data/` and `data.dvc` do not agree, or the data cannot be had; the message says what to run."""


def pinned_md5(pointer: Path) -> str:
    """The md5 in a DVC pointer file, read without DVC; the `.dir` suffix of folders is cut off.

    Raises:
        DataVersionError: the file is missing or is no pointer to a single output.
    """
    try:
        outs = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"]
        return outs[0]["md5"].removesuffix(".dir")
    except FileNotFoundError:
        raise DataVersionError(f"{pointer}: is missing. Remedy: `dvc add data`, or check it out of git.") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataVersionError(f"{pointer}: is not a DVC pointer file ({error}). Remedy: `dvc add data`.") from error


class DvcData(dg.ConfigurableResource):
    """The curated data of this repository, at the version that `data.dvc` pins."""

    root: str

    @property
    def pointer(self) -> Path:
        """Path of `data.dvc`."""
        return Path(self.root) / "data.dvc"

    def md5(self) -> str:
        """Version of all of `data/`."""
        return pinned_md5(self.pointer)

    def checkout(self, names: list[str]) -> dict[str, tuple[Path, str]]:
        """Make sure the named files of `data/` are there and are what `data.dvc` pins; returns path and md5 by name.

        Missing files are pulled from the DVC remote. A file that differs from the pinned version is never overwritten
        and never used: its results could not be traced back to a version.
        """
        folder = Path(self.root) / "data"
        if any(not (folder / name).exists() for name in names):
            self._pull()
        manifest = self._read_manifest()
        out = {}
        for name in names:
            if name not in manifest:
                known = ", ".join(sorted(manifest)) or "nothing"
                raise DataVersionError(
                    f"data/{name}: is not part of the version that data.dvc pins (it holds {known}). "
                    "Remedy: correct the name in the recipe, or run `dvc add data`."
                )
            path = folder / name
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
            if md5 != manifest[name]:
                raise DataVersionError(
                    f"data/{name}: differs from the version that data.dvc pins. Remedy: run `dvc add data` to use the "
                    "new content, or `dvc checkout data` to go back to the pinned one."
                )
            out[name] = (path, md5)
        return out

    def _read_manifest(self) -> dict[str, str]:
        md5 = self.md5()
        relative = Path("files", "md5", md5[:2], f"{md5[2:]}.dir")
        for _ in range(2):
            for store in self._stores():
                if (store / relative).exists():
                    rows = json.loads((store / relative).read_text(encoding="utf-8"))
                    return {row["relpath"]: row["md5"] for row in rows}
            self._pull()
        raise DataVersionError(f"the manifest of data version {md5} is in no cache or remote. Remedy: `dvc pull`.")

    def _stores(self) -> Iterator[Path]:
        yield Path(self.root) / ".dvc" / "cache"
        yield Path(self.root) / "dvc_store"
        # Only DVC knows all places where `cache dir` may be set; importing it takes seconds, so it is asked last.
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo(self.root) as repo:
                configured = Path(repo.cache.local_cache_dir)
        except DvcException as error:
            raise DataVersionError(f"{self.root}: is no usable DVC repository: {error}. Remedy: `dvc doctor`.") from error
        yield configured

    def _pull(self) -> None:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        lock = Path(self.root) / ".dvc" / "tmp" / "pipeline.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock), Repo(self.root) as repo:
                repo.pull(targets=[str(self.pointer)])
        except DvcException as error:
            raise DataVersionError(f"data/ could not be pulled from the DVC remote: {error}. Remedy: `dvc pull -v`.") from error
