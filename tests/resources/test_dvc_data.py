"""Data at the version that `data.dvc` pins, on a real DVC repository: pulled when missing, refused when modified."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from resources.dvc_data import DataVersionError, DvcData, pinned_md5

FILES = {"pairs.jsonl": '{"prompt": "a"}\n', "prompts.jsonl": '{"prompt": "b"}\n'}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository with two files in `data/`, pushed to the remote `dvc_store/`."""
    return make_repository(tmp_path_factory.mktemp("template") / "repository", remote="dvc_store")


def make_repository(root: Path, remote: str) -> Path:
    from dvc.repo import Repo

    (root / "data").mkdir(parents=True)
    Repo.init(str(root), no_scm=True).close()
    config = f"[core]\n    no_scm = true\n    analytics = false\n    remote = ours\n['remote \"ours\"']\n    url = ../{remote}\n"
    (root / ".dvc" / "config").write_text(config)
    for name, text in FILES.items():
        (root / "data" / name).write_text(text)
    with Repo(str(root)) as repo:
        repo.add(str(root / "data"))
        repo.push()
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository; the process works in it, as under `make`."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "repository"))
    return tmp_path / "repository"


def add(root: Path) -> None:
    """`dvc add data`."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        repo.add(str(root / "data"))


def forget(path: Path) -> None:
    """Delete a folder that DVC may have write-protected."""
    shutil.rmtree(path)


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def assert_pinned(root: Path, names: list[str]) -> None:
    found = DvcData(root=str(root)).checkout(names)
    assert found == {name: (root / "data" / name, md5(FILES[name])) for name in names}
    assert all((root / "data" / name).read_text() == FILES[name] for name in names)


def test_pinned_files_are_handed_out_with_their_md5(root):
    assert_pinned(root, list(FILES))
    assert_pinned(root, ["prompts.jsonl"])
    assert DvcData(root=str(root)).checkout([]) == {}


def test_missing_data_is_pulled_from_the_embedded_remote(root):
    forget(root / "data")
    forget(root / ".dvc" / "cache")
    assert_pinned(root, list(FILES))


def test_missing_data_is_pulled_whatever_folder_the_process_works_in(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `dagster dev -w /path/to/workspace.yaml` from anywhere
    forget(root / "data")
    assert_pinned(root, list(FILES))


def test_missing_data_is_pulled_from_a_remote_elsewhere(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "repository", remote="../elsewhere")
    monkeypatch.chdir(root)
    forget(root / "data")
    forget(root / ".dvc" / "cache")
    assert_pinned(root, list(FILES))


def test_one_missing_file_comes_back_and_the_others_stay(root):
    os.remove(root / "data" / "pairs.jsonl")
    before = (root / "data" / "prompts.jsonl").stat().st_mtime_ns
    assert_pinned(root, ["pairs.jsonl"])
    assert (root / "data" / "prompts.jsonl").stat().st_mtime_ns == before


def test_a_check_pulls_nothing_and_says_what_is_not_there_yet(root):
    data = DvcData(root=str(root))
    data.check()
    os.remove(root / "data" / "pairs.jsonl")
    with pytest.raises(DataVersionError, match=r"data/pairs\.jsonl: is not there yet\. Remedy: .*dvc pull data\.dvc"):
        data.check()
    assert not (root / "data" / "pairs.jsonl").exists()
    forget(root / ".dvc" / "cache")
    forget(root / "dvc_store")
    with pytest.raises(DataVersionError, match=r"the manifest .* is in no cache yet\. Remedy: .*dvc pull data\.dvc"):
        data.check()


def test_data_in_the_cache_needs_no_remote(root):
    forget(root / "data")
    forget(root / "dvc_store")
    assert_pinned(root, list(FILES))


def test_files_in_a_cache_elsewhere_are_found(root, tmp_path):
    shutil.move(root / ".dvc" / "cache", tmp_path / "shared_cache")
    forget(root / "dvc_store")
    with (root / ".dvc" / "config").open("a") as file:
        file.write("[cache]\n    dir = ../../shared_cache\n")
    assert_pinned(root, list(FILES))


def modify(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def test_a_modified_file_is_refused_and_left_alone(root):
    modify(root / "data" / "pairs.jsonl", "mine")
    with pytest.raises(DataVersionError) as caught:
        DvcData(root=str(root)).checkout(["prompts.jsonl", "pairs.jsonl"])
    assert "data/pairs.jsonl: differs from the version that data.dvc pins" in str(caught.value)
    assert "if you changed it, run `.venv/bin/dvc add data`" in str(caught.value)
    assert "`.venv/bin/dvc pull data.dvc`" in str(caught.value)
    assert (root / "data" / "pairs.jsonl").read_text() == "mine"


def test_a_modified_neighbour_does_not_matter(root):
    modify(root / "data" / "pairs.jsonl", "mine")
    assert_pinned(root, ["prompts.jsonl"])


def test_pulling_a_missing_file_never_overwrites_a_modified_one(root):
    modify(root / "data" / "pairs.jsonl", "mine")
    os.remove(root / "data" / "prompts.jsonl")
    with pytest.raises(DataVersionError, match="Remedy"):
        DvcData(root=str(root)).checkout(["prompts.jsonl"])
    assert (root / "data" / "pairs.jsonl").read_text() == "mine"


def test_after_dvc_add_the_new_content_counts(root):
    data = DvcData(root=str(root))
    before = data.md5()
    modify(root / "data" / "pairs.jsonl", "mine")
    add(root)
    assert data.md5() != before
    found = data.checkout(list(FILES))
    assert found["pairs.jsonl"][1] == md5("mine")
    assert found["prompts.jsonl"][1] == md5(FILES["prompts.jsonl"])  # unchanged: nothing that reads it is computed anew


def test_an_unknown_name_is_refused_with_what_there_is(root):
    with pytest.raises(DataVersionError) as caught:
        DvcData(root=str(root)).checkout(["pears.jsonl"])
    assert "data/pears.jsonl: is not part of the version that data.dvc pins" in str(caught.value)
    assert "pairs.jsonl, prompts.jsonl" in str(caught.value)


def test_an_unknown_name_is_refused_as_such_without_a_network(root):
    forget(root / "dvc_store")
    with pytest.raises(DataVersionError, match=r"data/pears\.jsonl: is not part of the version"):
        DvcData(root=str(root)).checkout(["pears.jsonl"])


def test_data_that_nobody_has_is_one_clear_error(root):
    for folder in ("data", "dvc_store", ".dvc/cache"):
        forget(root / folder)
    with pytest.raises(DataVersionError, match="Remedy: `dvc pull"):
        DvcData(root=str(root)).checkout(["pairs.jsonl"])


def test_the_pointers_md5_is_what_dvc_wrote(root):
    text = (root / "data.dvc").read_text()
    pinned = DvcData(root=str(root)).md5()
    assert f"md5: {pinned}.dir" in text
    assert (root / ".dvc" / "cache" / "files" / "md5" / pinned[:2] / f"{pinned[2:]}.dir").exists()


BROKEN_POINTERS = {
    "missing": None,
    "empty": b"",
    "not yaml": b"outs: [",
    "merge conflict": b"outs:\n<<<<<<< HEAD\n- md5: a.dir\n=======\n- md5: b.dir\n>>>>>>> theirs\n",
    "a list": b"- outs\n",
    "text": b"outs\n",
    "no outs": b"md5: abc\n",
    "outs that are none": b"outs:\n",
    "outs without entry": b"outs: []\n",
    "no md5": b"outs:\n- path: data\n",
    "md5 that is none": b"outs:\n- md5:\n",
    "md5 that is a number": b"outs:\n- md5: 17\n",
    "not utf-8": b"outs:\n- md5: caf\xe9\n",
}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            content,
            id=name,
        )
        for name, content in BROKEN_POINTERS.items()
    ],
)
def test_a_broken_pointer_is_one_clear_error(tmp_path, content):
    pointer = tmp_path / "data.dvc"
    if content is not None:
        pointer.write_bytes(content)
    with pytest.raises(DataVersionError) as caught:
        pinned_md5(pointer)
    assert str(caught.value).startswith(str(pointer))
    assert "Remedy" in str(caught.value)


def test_a_pointer_to_one_file_has_its_md5(tmp_path):
    pointer = tmp_path / "data.dvc"
    pointer.write_text("outs:\n- md5: 0123456789abcdef0123456789abcdef\n  path: data.jsonl\n")
    assert pinned_md5(pointer) == "0123456789abcdef0123456789abcdef"
