"""DVC-versioned data: what `data.dvc` pins, whether `data/` is exactly that, and how to get it.

The md5 in `data.dvc` is the version of all of `data/`; the manifest behind it gives the md5 of each file, so that an
asset depends on the files it reads and not on its neighbours.

Data that the pipeline generates is versioned, too, but never inside `data/`: `generated/<asset>/<partition>/<md5>.dvc` is an
ordinary DVC pointer that git may track, and the files are in DVC's cache under what it names. Named by content, a pointer is
never overwritten.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from filelock import FileLock

from alignment.errors import UserError

LOCK_PATIENCE = 60.0
"""Seconds to wait for a DVC command of somebody else's."""


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
        raise DataVersionError(f"{pointer}: is missing. Remedy: `.venv/bin/dvc add data`, or check it out of git.") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataVersionError(f"{pointer}: is not a DVC pointer file ({error}). Remedy: `dvc add data`.") from error


def folder_md5(folder: Path, names: Sequence[str]) -> str:
    """The md5 under which DVC knows a folder that holds just these files, without its suffix `.dir`."""
    rows = []
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            rows.append({"md5": hashlib.file_digest(file, "md5").hexdigest(), "relpath": name})
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest()


class DvcData(dg.ConfigurableResource):
    """The curated data of this repository, at the version that `data.dvc` pins; and versions of generated data.

    `push_to` names the DVC remote that generated data is pushed to as it is made. Empty: none, so that it stays in the
    cache until somebody runs `dvc push`.
    """

    root: str
    push_to: str = ""

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
                    f"data/{name}: differs from the version that data.dvc pins. Remedy: if you changed it, run "
                    "`.venv/bin/dvc add data` to use the new content; if data.dvc is new (after `git pull`), or to go back to "
                    "the pinned one, run `.venv/bin/dvc pull data.dvc`."
                )
            out[name] = (path, md5)
        return out

    def check(self) -> None:
        """Make sure that all of `data/` is there and is what `data.dvc` pins. Pulls nothing, which may take any time.

        Raises:
            DataVersionError: as `checkout`; or a file, or the manifest, is not there.
        """
        names = sorted(self._read_manifest(pull=False))
        for name in names:
            if not (Path(self.root) / "data" / name).exists():
                raise DataVersionError(f"data/{name}: is not there yet. Remedy: run `.venv/bin/dvc pull data.dvc`.")
        self.checkout(names)

    def version(self, folder: Path, names: Sequence[str], pointer: str) -> Path:
        """Make sure that DVC has the named files of a folder, as one data set, and return the path of its pointer.

        Done before and still there: neither DVC nor the pointer is touched. Otherwise a copy is put beside the pointer, as
        `dvc add` wants it; that copy may be deleted and comes back with `dvc checkout <pointer>`.

        Args:
            pointer: path of the pointer relative to the root, as in `generated/<asset>/<partition>/<md5>.dvc`.
        """
        path, md5 = Path(self.root) / pointer, folder_md5(folder, names)
        if not self.push_to and path.exists() and pinned_md5(path) == md5 and self._is_cached(md5):
            return path

        def add(repo: Any) -> None:
            working = path.with_suffix("")
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
            for name in names:
                shutil.copyfile(folder / name, working / name)
            repo.scm_context.quiet = True  # no advice to run `git add` in a step's log
            repo.add(str(working))
            if self.push_to:
                repo.push(targets=[str(path)], remote=self.push_to)

        try:
            self._with_repository(add, f"{path}: could not be written by DVC", "`dvc doctor`, then materialize again")
        except OSError as error:
            raise DataVersionError(f"{path}: cannot be written: {error}. Remedy: make the folder writable.") from error
        if pinned_md5(path) != md5:
            raise DataVersionError(f"{path}: DVC left out a file of {', '.join(names)}. Remedy: correct .dvcignore.")
        return path

    def _is_cached(self, md5: str) -> bool:
        # The default cache only: where another is configured, DVC is asked, which takes a second.
        objects = Path(self.root) / ".dvc" / "cache" / "files" / "md5"
        manifest = objects / md5[:2] / f"{md5[2:]}.dir"
        if not manifest.exists():
            return False
        rows = json.loads(manifest.read_text(encoding="utf-8"))
        return all((objects / row["md5"][:2] / row["md5"][2:]).exists() for row in rows)

    def _read_manifest(self, pull: bool = True) -> dict[str, str]:
        md5 = self.md5()
        relative = Path("files", "md5", md5[:2], f"{md5[2:]}.dir")
        for _ in range(2):
            for store in self._stores():
                if (store / relative).exists():
                    rows = json.loads((store / relative).read_text(encoding="utf-8"))
                    return {row["relpath"]: row["md5"] for row in rows}
            if not pull:
                raise DataVersionError(
                    f"the manifest of data version {md5} is in no cache yet. Remedy: run `.venv/bin/dvc pull data.dvc`."
                )
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
        def pull(repo: Any) -> None:
            repo.pull(targets=[str(self.pointer)])

        self._with_repository(pull, "data/ could not be pulled from the DVC remote", "`dvc pull -v`")

    def _with_repository(self, action: Callable[[Any], None], problem: str, remedy: str) -> None:
        """Run an action on the DVC repository, one process of ours at a time.

        DVC itself gives up after three seconds when somebody else's command holds its lock; we wait a minute.
        """
        from dvc.exceptions import DvcException
        from dvc.lock import LockError
        from dvc.repo import Repo

        lock = Path(self.root) / ".dvc" / "tmp" / "pipeline.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + LOCK_PATIENCE
        with FileLock(lock):
            while True:
                try:
                    with Repo(self.root) as repo:
                        action(repo)
                    return
                except LockError as error:
                    if time.monotonic() > end:
                        raise DataVersionError(f"{problem}: {error}. Remedy: {remedy}.") from error
                except DvcException as error:
                    raise DataVersionError(f"{problem}: {error}. Remedy: {remedy}.") from error
