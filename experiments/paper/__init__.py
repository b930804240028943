"""The paper's tables and figures at a size that two CPU cores allow: `python -m experiments.all`.

`cells` keeps small results and goes on from them, `fits` trains one cell, `works` has the models and rows; every other
file is a table or a figure with its settings on top.
"""
