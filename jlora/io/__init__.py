"""Files in, files out."""

from jlora.io.load import Pretrained, load

__all__ = ["Pretrained", "load"]
