"""Many adapters over one frozen base: a batch whose rows each have their own adapter, or none."""

from jlora.bank.bank import AdapterBank, BankFull, with_rows
from jlora.bank.leaf import BankFactors, BankLeaf
from jlora.bank.shelf import Shelf

__all__ = ["AdapterBank", "BankFactors", "BankFull", "BankLeaf", "Shelf", "with_rows"]
