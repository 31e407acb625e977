"""Generated data under DVC, on a real git and DVC repository: what a pointer brings back, and when nothing is done twice."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from resources import dvc_data
from resources.dvc_data import DataVersionError, DvcData, folder_md5

FILES = {"pairs.jsonl": b'{"prompt": "a"}\n{"prompt": "b"}\n', "rounds.jsonl": '{"prompt": "größer"}\n'.encode()}
NAMES = list(FILES)
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with DVC, a remote, and this project's .gitignore."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("template") / "repository"
    root.mkdir()
    git(root, "init", "--quiet")
    Repo.init(str(root)).close()
    config = (
        "[core]\n    analytics = false\n    autostage = false\n    remote = ours\n['remote \"ours\"']\n    url = ../../remote\n"
    )
    (root / ".dvc" / "config").write_text(config)
    shutil.copy(PROJECT / ".gitignore", root)
    commit(root)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "repository"))
    return tmp_path / "repository"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact's folder, with a file beside the data."""
    folder = tmp_path / "storage" / "constitutional_preference_pairs" / "0123"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "artifact.json").write_text("{}")
    return folder


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *who, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "state")


def dvc(root: Path, *arguments: str) -> None:
    """A DVC command as a user types it."""
    from dvc.cli import main

    assert main(["--cd", str(root), *arguments]) == 0


def pointer_of(folder: Path) -> str:
    return f"generated/constitutional_preference_pairs/general/{folder_md5(folder, NAMES)[:12]}.dvc"


def version(root: Path, artifact: Path, **settings: str) -> Path:
    return DvcData(root=str(root), **settings).version(artifact, NAMES, pointer_of(artifact))


def assert_restored(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_the_pointer_is_one_that_dvc_itself_would_write(root, artifact):
    pointer = version(root, artifact)
    (out,) = yaml.safe_load(pointer.read_text())["outs"]
    assert out == {
        "md5": f"{folder_md5(artifact, NAMES)}.dir",
        "size": sum(map(len, FILES.values())),
        "nfiles": 2,
        "hash": "md5",
        "path": pointer.stem,
    }
    assert_restored(pointer.with_suffix(""))


def test_git_sees_the_pointer_and_nothing_else(root, artifact):
    pointer = version(root, artifact)
    assert git(root, "status", "--short", "--untracked-files=all").splitlines() == [f"?? {pointer.relative_to(root)}"]


def test_pairs_come_back_from_the_cache_after_storage_was_deleted(root, artifact):
    pointer = version(root, artifact)
    shutil.rmtree(artifact)
    shutil.rmtree(pointer.with_suffix(""))
    dvc(root, "checkout", str(pointer.relative_to(root)))
    assert_restored(pointer.with_suffix(""))


def test_a_pointer_from_mlflow_brings_them_back_from_the_remote(root, artifact, tmp_path):
    pointer = version(root, artifact)
    dvc(root, "push", str(pointer.relative_to(root)))
    logged = shutil.copy(pointer, tmp_path)
    for folder in (artifact, root / "generated", root / ".dvc" / "cache"):
        shutil.rmtree(folder)
    (root / "restored").mkdir()
    shutil.copy(logged, root / "restored")
    dvc(root, "pull", f"restored/{pointer.name}")
    assert_restored(root / "restored" / pointer.stem)


def test_a_committed_pointer_serves_a_colleague_who_clones(root, artifact, tmp_path):
    pointer = version(root, artifact)
    dvc(root, "push", str(pointer.relative_to(root)))
    commit(root)
    clone = tmp_path / "clone"
    git(root, "clone", "--quiet", str(root), str(clone))
    place = pointer.relative_to(root)
    dvc(clone, "pull", str(place))
    assert_restored(clone / place.with_suffix(""))
    dvc(tmp_path, "get", str(root), str(place.with_suffix("")), "--rev", "HEAD", "--out", "got")
    assert_restored(tmp_path / "got")


def test_data_is_pushed_as_it_is_made_where_a_remote_is_named(root, artifact, tmp_path):
    pointer = version(root, artifact, push_to="ours")
    assert len([path for path in (tmp_path / "remote").rglob("*") if path.is_file()]) == 3
    shutil.rmtree(root / ".dvc" / "cache")
    shutil.rmtree(pointer.with_suffix(""))
    dvc(root, "pull", str(pointer.relative_to(root)))
    assert_restored(pointer.with_suffix(""))


def test_an_unknown_remote_is_one_clear_error(root, artifact):
    with pytest.raises(DataVersionError, match="Remedy"):
        version(root, artifact, push_to="theirs")


def test_what_is_versioned_already_is_left_alone(root, artifact, monkeypatch):
    pointer = version(root, artifact)
    (pointer.with_suffix("") / "pairs.jsonl").unlink()  # whoever deletes the copy has a reason
    before = pointer.stat().st_mtime_ns
    monkeypatch.setitem(sys.modules, "dvc.repo", None)  # nor is DVC imported
    assert version(root, artifact) == pointer
    assert pointer.stat().st_mtime_ns == before
    assert not (pointer.with_suffix("") / "pairs.jsonl").exists()


@pytest.mark.parametrize("lost", ["generated", ".dvc/cache"])
def test_a_version_that_was_lost_is_made_again(root, artifact, lost):
    version(root, artifact)
    shutil.rmtree(root / lost)
    pointer = version(root, artifact)
    shutil.rmtree(artifact)
    shutil.rmtree(pointer.with_suffix(""))
    dvc(root, "checkout", str(pointer.relative_to(root)))
    assert_restored(pointer.with_suffix(""))


def test_other_content_is_another_pointer_beside_the_first(root, artifact):
    first = version(root, artifact)
    (artifact / "pairs.jsonl").write_bytes(b'{"prompt": "c"}\n')
    second = version(root, artifact)
    assert {p.name for p in first.parent.glob("*.dvc")} == {first.name, second.name}


def test_a_users_dvc_command_is_waited_for(root, artifact):
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        repo.lock.lock()
        threading.Timer(4.5, repo.lock.unlock).start()  # DVC itself gives up after three seconds
        assert version(root, artifact).exists()


def test_a_lock_that_is_never_freed_is_one_clear_error(root, artifact, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.setattr(dvc_data, "LOCK_PATIENCE", 0.0)
    with Repo(str(root)) as repo, repo.lock, pytest.raises(DataVersionError, match=r"Unable to acquire lock.*Remedy"):
        version(root, artifact)


def test_a_file_that_dvc_ignores_is_one_clear_error(root, artifact):
    (root / ".dvcignore").write_text("rounds.jsonl\n")
    with pytest.raises(DataVersionError, match=r"left out a file of pairs\.jsonl, rounds\.jsonl\. Remedy: correct \.dvcignore"):
        version(root, artifact)


def test_no_repository_is_one_clear_error(tmp_path, artifact):
    with pytest.raises(DataVersionError, match="Remedy"):
        version(tmp_path / "elsewhere", artifact)
