"""What a run of several ways says, in tables:  python benchmarks/tables.py FILE.jsonl"""

import sys

import pandas as pd

import colqwen_lab as lab
from colqwen_lab.analysis import ablation

pd.set_option("display.width", 160, "display.max_colwidth", None)
results = lab.load(sys.argv[1])
made = (
    ablation.overhead_table,
    ablation.gains,
    ablation.ablation,
    ablation.eight_bits,
    ablation.controls,
)
for table in (*(make(results) for make in made), ablation.shares(lab.explain(results))):
    if len(table):
        print(table.T.to_string(), end="\n\n")
print(ablation.verdict(results))
