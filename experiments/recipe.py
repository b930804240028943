"""One recipe: settings of `jlora train`, the paper's figure and its conditions, the commands for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from jlora.commands.settings import TrainConfig
from jlora.plan.known import topology

HEAD = """# jlora train --config {file} --output runs/{name}
# then: {judge}
# on a TPU VM: {vm} experiments/cloud/vm.sh with {file} in train.yaml's place
# compiled for it before, with no TPU and no weights: jlora train --config {file} --dry-run --topology {topology}
# the paper: {expected}; trained parameters without a head: {trained:,}
"""
TOPOLOGIES = {"v5litepod-8": "v5e:2x4", "v5litepod-4": "v5e:2x2", "v5litepod-1": "v5e:1", "v5p-256": "v5p:4x4x8"}
"""The chips of Google's accelerator types (v5p's count cores, two a chip)."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings; the paper's figure; how many parameters train, the head's left out; how to judge; what to know.

    slice: the accelerator type, where a host is too small.
    """

    settings: dict[str, Any]
    expected: str
    trained: int
    judge: str
    notes: tuple[str, ...] = ()
    slice: str = ""

    @property
    def chips(self) -> str:
        """The accelerator type: if none is given, the most chips of a host that a batch splits into."""
        split = lambda name: self.config.batch % topology(TOPOLOGIES[name]).devices == 0
        return self.slice or next(filter(split, TOPOLOGIES))

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(**self.settings)

    def text(self, name: str) -> str:
        """A settings file with its commands and conditions on top."""
        flat = name.replace("/", "-")
        vm = f"TYPE={self.chips}" + (" IMAGE=v2-alpha-tpuv5" if self.chips.startswith("v5p") else "")
        facts = {"judge": self.judge, "expected": self.expected, "trained": self.trained}
        top = HEAD.format(file=f"{flat}.yaml", name=flat, vm=vm, topology=TOPOLOGIES[self.chips], **facts)
        top += "".join(f"# - {note}\n" for note in self.notes)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings.items()}
        return top + yaml.safe_dump(plain, sort_keys=False)
