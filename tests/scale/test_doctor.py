"""The doctor's checks, each seen well and ill."""

import socket

import pytest

from jlora import doctor


@pytest.mark.usefixtures("compile_cache")
def test_a_sound_machine_is_said_to_be(tmp_path):
    report = doctor.run(doctor.DoctorConfig(output=str(tmp_path / "run")))
    assert [check["name"] for check in report["checks"]][:3] == ["devices", "versions", "memory"]
    assert not [check for check in report["checks"] if check["name"] in ("versions", "run folder") and "fix" in check]
    assert not (tmp_path / "run").exists()


def test_a_folder_in_new_folders_leaves_none_of_them(tmp_path):
    (tmp_path / "held").mkdir()
    for output in ("a/b/c", "held/b", "held"):
        assert "writable" in doctor.folder(str(tmp_path / output)).saw
    assert [path.name for path in tmp_path.rglob("*")] == ["held"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check = doctor.folder(str(tmp_path / "file" / "run"))
    assert "--output" in check.fix


def test_a_bucket_has_no_size(tmp_path, monkeypatch):
    monkeypatch.setattr("etils.epath.Path", lambda output: tmp_path / output.partition("://")[2])
    for output in ("gs://bucket/run", "s3://bucket/run"):
        assert doctor.folder(output) == doctor.Check("run folder", f"{output}: writable")

    def absent(output):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("etils.epath.Path", lambda output: tmp_path)
    monkeypatch.setattr(type(tmp_path), "exists", absent)
    check = doctor.folder("s3://bucket/run")
    assert "s3fs" in check.saw and check.fix == "pip install the package named here, which s3:// paths need"
    assert doctor.folder("gs://bucket/run").fix == "pip install gcsfs, which gs:// paths need"


def test_a_coordinator_is_reached_or_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not doctor.network(f"127.0.0.1:{port}").fix
    assert f"port {port}" in doctor.network(f"127.0.0.1:{port}").fix
    assert doctor.network("nowhere").fix == "write --coordinator HOST:PORT"


@pytest.mark.usefixtures("compile_cache")
def test_a_compile_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    assert doctor.cache("runs").saw.startswith(f"{tmp_path / 'cache'}: writable")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "JAX_COMPILATION_CACHE_DIR" in doctor.cache("runs").fix


def test_an_accelerator_that_is_not_used_is_named(tmp_path):
    assert doctor.unused_accelerator(str(tmp_path)) == ""
    (tmp_path / "nvidia0").write_text("")
    assert "jlora[cuda]" in doctor.unused_accelerator(str(tmp_path))
    (tmp_path / "accel0").write_text("")
    assert "jlora[tpu]" in doctor.unused_accelerator(str(tmp_path))


def test_a_tpu_behind_vfio_is_named(tmp_path):
    dev, pci = tmp_path / "dev", tmp_path / "pci"
    for number, maker in enumerate(("0x8086", "0x1ae0")):
        (pci / f"0000:00:0{number}.0").mkdir(parents=True)
        (pci / f"0000:00:0{number}.0" / "vendor").write_text(maker + "\n")
    (dev / "vfio").mkdir(parents=True)
    (dev / "vfio" / "vfio").write_text("")
    saw = lambda: doctor.unused_accelerator(str(dev), str(pci))
    assert saw() == ""  # Google's network card
    (dev / "vfio" / "0").write_text("")
    assert "jlora[tpu]" in saw()
    (pci / "0000:00:01.0" / "vendor").write_text("0x10de\n")
    assert saw() == ""


def test_little_memory_is_said(tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 9000000 kB\nMemAvailable:    1048576 kB\n")
    check = doctor.memory(str(told))
    assert check.saw.startswith("host 1.0 GiB free") and "4 GiB" in check.fix


def test_versions_that_differ(monkeypatch):
    held = {"jax": "0.10.2", "jaxlib": "0.9.1"}
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: held.get(name, "1.0"))
    assert "jax and jaxlib differ" in doctor.versions().fix
