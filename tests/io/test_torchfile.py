"""torch's files without torch: every dtype and layout it writes, and nothing that would run."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest

from jlora.io.pickled import unpickle
from jlora.io.torchfile import read_bin


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def archive(path, data):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_tensors_of_torch(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]
    base = torch.arange(24).reshape(2, 3, 4)
    held = {str(kind): base.to(kind) for kind in kinds}
    held |= {"transposed": base.float().permute(2, 1, 0), "part": base.float()[:, 1, ::2], "scalar": torch.tensor(2.5)}
    held["parameter"] = torch.nn.Parameter(base.float())
    held["shared"] = held["torch.float32"]
    torch.save(held, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    got = read_bin(tmp_path / "x.bin")
    assert set(got) == set(held)
    for name, want in held.items():
        array = np.asarray(got[name])
        assert array.dtype.name == str(want.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float32), want.detach().float().numpy())
    raw = (tmp_path / "x.bin").read_bytes()
    for size in (10, len(raw) // 2, len(raw) - 40):
        (tmp_path / "cut.bin").write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"cut\.bin cannot be read as PyTorch weights"):
            {name: np.asarray(x) for name, x in read_bin(tmp_path / "cut.bin").items()}


def test_code_is_refused_and_not_run(tmp_path, capsys):
    archive(tmp_path / "evil.bin", pickle.dumps(Evil()))
    (tmp_path / "older.bin").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.bin", "older.bin"):
        with pytest.raises(ValueError, match=r"it asks for builtins\.print"):
            read_bin(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", b"\x80", pickle.dumps(3)])
def test_what_is_no_torch_file(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as PyTorch weights"):
        read_bin(tmp_path / "x.bin")
    archive(tmp_path / "y.bin", pickle.dumps([1]))
    with pytest.raises(ValueError, match="holds a list"):
        read_bin(tmp_path / "y.bin")


def test_an_odd_escape_is_no_warning():
    with pytest.raises(pickle.UnpicklingError, match="STRING"):
        unpickle(b"S'\\-'\n.", lambda name: None, None, None)
