"""Which adapters may be loaded: those in the configured folders, whatever a path or a link says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jlora.serve.schema import BadRequest

FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "chat_template.jinja")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class Folders:
    """`roots`, resolved. Nothing outside of them is opened, not by `..`, an absolute path or a symbolic link."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        for root in roots:
            if not Path(root).is_dir():
                raise FileNotFoundError(f"{root}: no such folder of adapters")
        self.roots = [Path(root).resolve(strict=True) for root in roots]

    def inside(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.roots)

    def find(self, given: str) -> Path:
        """The adapter's folder: an absolute path, or one in a root. Raises BadRequest.

        What lies outside and what is not there are refused in the same words, so that nobody can feel about.
        """
        refused = BadRequest(f"{given[:200]}: no adapter folder of that name in the configured folders", "lora_path")
        if not self.roots:
            raise BadRequest("no folder is configured to load adapters from: start with --adapters", "lora_path", 403)
        if "\0" in given or not given:
            raise refused
        for root in self.roots:
            try:
                folder = (root / given).resolve(strict=True)
                files = [(folder / name).resolve() for name in FILES if (folder / name).exists()]
            except (OSError, RuntimeError):
                continue
            if self.inside(folder) and files and all(map(self.inside, files)) and (folder / FILES[0]).is_file():
                return folder
        raise refused

    def found(self) -> dict[str, Path]:
        """{name: folder} of what lies in the roots: NAME/ itself, or the adapter/ in it that `jlora train` writes."""
        out: dict[str, Path] = {}
        for root in self.roots:
            for entry in sorted(root.iterdir()):
                for folder in (entry, entry / "adapter"):
                    if not (folder / FILES[0]).is_file() or not NAME.fullmatch(entry.name):
                        continue
                    try:
                        out.setdefault(entry.name, self.find(str(folder)))
                    except BadRequest:  # a link that leads out
                        continue
                    break
        return out


def name_of(given: object) -> str:
    """Raises BadRequest."""
    if not isinstance(given, str) or not NAME.fullmatch(given) or ".." in given:
        raise BadRequest("lora_name must be 1 to 128 letters, digits and . _ : / -", "lora_name")
    return given
