"""Names of files that others wrote down, and places that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, describe_files, is_plain, locked, replaced


@pytest.mark.parametrize(
    "name", ["a.txt", "train/de-en/de.txt", ".hidden", "a..b", "mp_rank_00_model_states.pt"]
)
def test_names_below_a_folder(name):
    assert is_plain(name)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../x", "..", ".", "/etc/passwd", "a//b", "a/", "", "a\nb", "a\x00b", "x" * 256, None, 3],
)
def test_names_that_lead_elsewhere(name):
    assert not is_plain(name)


def test_a_manifest_cannot_name_a_file_outside_of_its_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_text("there")
    files = {"../outside": describe_files(tmp_path, ["outside"])["outside"]}
    assert "only files below" in (damage(folder, files, verify=True) or "")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/proc/none/here", "cannot be written: No such file or directory"),
        ("{}/file/below", "cannot be written: Not a directory|cannot be written: File exists"),
        ("{}/circle", "cannot be used: its symbolic links lead in a circle"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, path, why):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    place = Path(path.format(tmp_path))
    for write in (locked, replaced):
        with pytest.raises(UserError, match=why), write(place):
            pass


def test_the_checksum_is_compared_only_when_asked_for(tmp_path):
    (tmp_path / "a").write_text("here")
    files = describe_files(tmp_path, ["a"])
    (tmp_path / "a").write_text("hero")  # of the same size
    assert damage(tmp_path, files, verify=False) is None
    assert "its sha256 differs" in (damage(tmp_path, files, verify=True) or "")
