"""The README's example runs as printed and learns."""

import re
from pathlib import Path

import jax
import numpy as np


def test_the_ten_lines():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    start = names["jlora"].lorafy(names["params"], rank=8, alpha=16, key=jax.random.key(2))[1]
    assert names["loss"](names["lora"]) < 0.5 * names["loss"](start)
    want = names["apply"]({"params": names["jlora"].combine(names["frozen"], names["lora"])}, names["x"])
    np.testing.assert_allclose(names["model"].apply({"params": names["merged"]}, names["x"]), want, atol=1e-4)
