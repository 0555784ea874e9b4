"""The tables of a run of several configurations:  python benchmarks/tables.py FILE.jsonl"""

import sys

import pandas as pd

import colqwen_lab as lab
from colqwen_lab.analysis import ablation

pd.set_option("display.width", 160, "display.max_colwidth", None)
results = lab.predictions(lab.load(sys.argv[1])).results
tables = (
    *(ablation.speed_table, ablation.ablation),
    *(ablation.eight_bits, ablation.controls, ablation.shares),
)
for table in tables:
    frame = table(results)
    if len(frame):
        print(frame.T.to_string(), end="\n\n")
print(ablation.verdict(results))
