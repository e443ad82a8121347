"""A file or folder appears whole or not at all, and what was there stays until then."""

import pytest

from zo.io.atomic import replacing, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_exception_the_old_one_is_as_it_was(tmp_path, kind):
    path = tmp_path / "a"
    old = path / "old" if kind == "folder" else path
    if kind == "folder":
        path.mkdir()
    old.write_bytes(b"old")

    def fail():
        with replacing(path) as beside:
            beside.mkdir() if kind == "folder" else beside.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert old.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_a_folder_replaces_a_full_one_and_what_a_killed_process_left(tmp_path):
    for name in ("a", "a.new", ".a.replaced"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "old").touch()
    with replacing(tmp_path / "a") as beside:
        assert not beside.exists()
        (beside / "inner").mkdir(parents=True)
        (beside / "inner" / "new").write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a" / "inner").iterdir()] == ["new"]


def test_a_refused_rename_brings_the_old_folder_back(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a", tmp_path / "never"):
        pass  # Nothing was written, so that there is nothing to rename.
    assert (tmp_path / "a" / "old").exists()
