"""What a written model takes from the folder it was read from, and where it is not written."""

import dataclasses
import resource
import shutil

import pytest

from jlora.cli import sentence
from jlora.io.load import load
from jlora.io.save import own, save
from tests.small import small_model


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    base = load(small_model(tmp_path / "m"))
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", base, base.params)  # empty
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("mine")
    for place in ("out", "file"):
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            save(tmp_path / place, base, base.params)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "out.part").exists()


def test_the_licence_goes_with_the_weights(tmp_path):
    folder = small_model(tmp_path / "m")
    (tmp_path / "m" / "LICENSE").write_text("do as you like")
    base = load(folder)
    save(tmp_path / "out", base, base.params)
    assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like"


def test_only_files_of_the_models_own_repository_are_copied(tmp_path):
    snapshot, blobs, other = (tmp_path / "hub" / name for name in ("models--a/snapshots/1", "models--a/blobs", "b"))
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
        (folder / "x").write_text("x")
    (snapshot / "blob").symlink_to(blobs / "x")
    (snapshot / "foreign").symlink_to(other / "x")
    assert [own(snapshot, name) for name in ("x", "blob", "foreign", "absent")] == [True, True, False, False]
    plain = tmp_path / "plain"
    shutil.copytree(snapshot, plain, symlinks=True)
    assert [own(plain, name) for name in ("x", "blob", "foreign")] == [True, False, False]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_nothing(file, tmp_path):
    from transformers import PreTrainedTokenizerFast

    base = load(small_model(tmp_path / "m"))
    most = 1000  # bytes of a file, beyond which the system refuses as on a full disk
    if file == "tokenizer.json":
        backend = base.tokenizer.backend_tokenizer
        backend.add_tokens([f"word{n}" for n in range(1000)])
        base = dataclasses.replace(base, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
        most = (tmp_path / "m" / "model.safetensors").stat().st_size
    held = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, held[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save(tmp_path / "out", base, base.params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, held)
    assert sentence(caught.value) == f"{tmp_path / 'out'}: File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    save(tmp_path / "out", base, base.params)
