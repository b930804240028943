"""More adapters than fit in memory: folders on disk by name, the ones in use in an `AdapterBank`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jlora.bank.bank import AdapterBank
from jlora.data.template import template_for
from jlora.io.adapters import load_adapter
from jlora.io.load import Pretrained
from jlora.methods.fused import settle


@dataclasses.dataclass(frozen=True)
class Held:
    """An adapter on the shelf. `version` counts the files put under a name: requests of an older one keep theirs.

    `stamp`: what its files were like then, by which one written over is told. `base`: with the adapter's chat template.
    """

    name: str
    folder: Path
    version: int = 0
    stamp: tuple[int, ...] = ()
    base: Any = dataclasses.field(default=None, compare=False, repr=False)


class Shelf:
    """Adapters of `base` in PEFT's format, by name; read when they are wanted, least recently used out first."""

    def __init__(self, base: Pretrained, bank: AdapterBank) -> None:
        self.base, self.bank = base, bank
        self.held: dict[str, Held] = {}
        self.count = 0

    def put(self, name: str, folder: str | Path) -> Held:
        """Offer the adapter of `folder` as `name`, from now on. Raises what `examine` raises."""
        return self.offer(self.examine(name, Path(folder)))

    def examine(self, name: str, folder: Path) -> Held:
        """Read an adapter and see that it fits: what to offer. Changes nothing, so any thread may.

        Raises what `AdapterBank.checked` and reading raise.
        """
        stamp = stamp_of(folder)
        self.bank.checked(folder.name, self.read(folder))
        return Held(name, folder, stamp=stamp, base=self.base.speaking(template_for(None, folder)))

    def offer(self, held: Held) -> Held:
        self.count += 1
        self.held[held.name] = dataclasses.replace(held, version=self.count)
        return self.held[held.name]

    def read(self, folder: Path) -> Any:
        frozen, lora, _ = load_adapter(self.base, folder)
        del frozen  # the base's own weights; what a file holds besides factors is refused by the bank
        return settle(lora)

    def speaker(self, held: Held | None) -> Pretrained:
        """The base with the chat template of `held`, or, for None, with its own."""
        return self.base if held is None else held.base

    def drop(self, name: str) -> None:
        """Offer it no longer. Raises KeyError for a name that is not held."""
        del self.held[name]

    def pin(self, held: Held | None) -> int:
        """The slot of an adapter, read from disk if need be, kept until `unpin`.

        Raises BankFull without room, ValueError where the files are no longer those that were offered.
        """
        if held is not None and held not in self.bank:
            for key in [k for k in self.bank.slots if isinstance(k, Held) and self.held.get(k.name) is not k]:
                if key not in self.bank.pins:  # dropped or replaced, and no longer in use
                    self.bank.remove(key)
            self.same(held)
            lora = self.read(held.folder)
            self.same(held)  # written over meanwhile
            self.bank.add(held, lora)
        return self.bank.pin(held)

    def same(self, held: Held) -> None:
        """Raises ValueError where the files are no longer those that were offered."""
        if stamp_of(held.folder) != held.stamp:
            raise ValueError(f"{held.folder} was written over since it was loaded as {held.name!r}: load it again")

    def unpin(self, held: Held | None) -> None:
        """Raises nothing for one that is not pinned."""
        self.bank.unpin(held)


def stamp_of(folder: Path) -> tuple[int, ...]:
    """Number, size and time of the settings' file (its alpha scales the weights) and of the weights'.

    Of what is not there nothing, which reading then says.
    """
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    files = [folder / "adapter_config.json", *[folder / name for name in weights if (folder / name).exists()][:1]]
    stats = [file.stat() for file in files if file.exists()]
    return tuple(part for stat in stats for part in (stat.st_ino, stat.st_size, stat.st_mtime_ns))
