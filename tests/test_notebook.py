"""The notebook's cells run in order, as they stand, and show what the text says."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "experiments" / "notebooks" / "lora-from-nothing.ipynb"


def test_every_cell_runs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "notebook"}
    for n, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), f"cell {n}", "exec"), names)
    assert names["losses"][1] > 100 * names["losses"][2] and names["losses"][4] < 1e-3
    values = names["values"]
    assert values[1] > 50 * values[2] and names["gap"] < 1e-4
    right, frozen = names["right"], names["frozen"]
    assert right(names["params"], names["old"]) > 0.97 and right(names["params"], names["new"]) < 0.8
    assert right(names["tuned"], names["new"]) > 0.97
    assert names["jlora"].tree.size(names["lora"]) < names["jlora"].tree.size(frozen) / 2
