"""SmolLM2-135M-Instruct as a folder in Hub format, float32, which every contestant reads."""

from __future__ import annotations

from pathlib import Path

from jlora.io import load
from jlora.io.pypi import cache_folder
from jlora.io.save import save


def hub_folder() -> Path:
    folder = cache_folder() / "bench" / "smollm2-135m-instruct"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        base = load("smollm2-135m-instruct")
        save(folder, base, base.params)
    return folder
