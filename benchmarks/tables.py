"""What a run of several ways says, in tables:  python benchmarks/tables.py FILE.jsonl"""

import sys

import pandas as pd

import colqwen_lab as lab
from colqwen_lab.report import ways

pd.set_option("display.width", 160, "display.max_colwidth", None)
results = lab.load(sys.argv[1])
made = (ways.overhead_table, ways.gains, ways.ablation, ways.eight_bits, ways.controls)
for table in (*(make(results) for make in made), ways.shares(lab.explain(results))):
    if len(table):
        print(table.T.to_string(), end="\n\n")
print(ways.verdict(results))
