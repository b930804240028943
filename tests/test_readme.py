"""The README's example runs as printed and learns, and layouts are read off it as printed."""

import re
from pathlib import Path

import jax
import numpy as np


def test_the_ten_lines():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (ten_lines,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(ten_lines, "README.md", "exec"), names)
    start = names["jlora"].lorafy(names["params"], rank=8, alpha=16, key=jax.random.key(2))[1]
    assert names["loss"](names["lora"]) < 0.5 * names["loss"](start)
    want = names["apply"]({"params": names["jlora"].combine(names["frozen"], names["lora"])}, names["x"])
    np.testing.assert_allclose(names["model"].apply({"params": names["merged"]}, names["x"]), want, atol=1e-4)
    (read_off,) = re.findall(r"`(jlora\.layouts\(.*?\))`", text)
    layouts = eval(read_off, names)
    assert {layouts[path].letters for path in ("layers_0/kernel", "layers_2/kernel")} == {"io"}
