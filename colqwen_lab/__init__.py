"""What a quantised ColQwen3 costs and buys on your GPU.

    import colqwen_lab as lab
    results = lab.sweep("base,awq")   # measured here, one row per model and batch size
    results.plot("memory")
    lab.compare(results)              # speed, memory, cards, recommendations
    lab.compare("published")          # the report's figures

Importing the package, and everything that works from records alone, starts without torch.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colqwen_lab import signals  # noqa: F401  (first: Ctrl-C while the rest is imported)
from colqwen_lab.errors import BadInput, LabError, MissingRequirement
from colqwen_lab.options import (
    RAW,
    CompareOptions,
    FidelityOptions,
    PlanOptions,
    QuantizeOptions,
    SearchOptions,
    SweepOptions,
    takes,
)
from colqwen_lab.settings import outputs_folder

# Progress is printed as plain lines; without ipywidgets tqdm would warn with a path.
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    from colqwen_lab.analysis.compare import Comparison
    from colqwen_lab.analysis.fidelity import Fidelities
    from colqwen_lab.analysis.index import SearchTimes
    from colqwen_lab.analysis.plan import Plan, Predictions
    from colqwen_lab.analysis.quantized import Quantized
    from colqwen_lab.analysis.table import Results

__all__ = [
    "BadInput",
    "LabError",
    "MissingRequirement",
    "Results",
    "compare",
    "escape",
    "fidelity",
    "load",
    "outputs_folder",
    "parameters",
    "plan",
    "predictions",
    "quantize",
    "save",
    "search_times",
    "sweep",
]


@takes(SweepOptions)
def sweep(options: SweepOptions) -> Results:
    """Throughput and peak memory of each model at each batch size, measured on this machine.

    Rows on file are kept; the run resumes. Raises BadInput for a wrong value, MissingRequirement
    if there are no weights or no kernel for them here.
    """
    from colqwen_lab.analysis.table import Results
    from colqwen_lab.measure import cluster, sweep

    run = cluster.sweep_on_ray if options.on == "ray" else sweep.sweep
    return Results(tuple(run(options)))


@takes(PlanOptions)
def plan(options: PlanOptions) -> Plan:
    """Predicted peak memory at each batch size, and the largest batch each card holds."""
    from colqwen_lab.analysis.plan import Plan
    from colqwen_lab.analysis.table import Results
    from colqwen_lab.measure.sweep import to_stderr
    from colqwen_lab.predict import plan as prediction

    cells, cards = prediction.plan(options, to_stderr)
    return Plan(Results(tuple(cells)), tuple(cards))


@takes(CompareOptions)
def compare(options: CompareOptions) -> Comparison:
    """Speed and memory at every shared batch, what fits which card, the crossover, recommendations.

    Each GPU, size, workload and configuration in the files is compared on its own. Raises BadInput
    if the arguments are not records, or hold nothing to compare.
    """
    from colqwen_lab.analysis import compare
    from colqwen_lab.analysis.table import Results
    from colqwen_lab.records import GIB

    def results(value: Any) -> Results:
        if not isinstance(value, (str, Path, Results)):
            raise BadInput(
                f"base and awq must be Results, a records file or published, got {value!r}"
            )
        return value if isinstance(value, Results) else Results.load(value)

    base = results(options.base)
    if options.awq == "" and len(base.variants) == 1:
        raise BadInput(
            f"the file holds only {base.variants[0]}; give a second file for the other model"
        )
    awq = base if options.awq == "" else results(options.awq)
    budgets = [card.nominal_bytes / GIB for card in options.memory_budgets]
    return compare.compare(base, awq, budgets)


@takes(QuantizeOptions)
def quantize(options: QuantizeOptions) -> Quantized:
    """The folder of a whole checkpoint with a packed language model, and its record with errors.

    Raises BadInput for a wrong value, MissingRequirement if the checkpoint cannot be made.
    """
    from colqwen_lab.analysis.quantized import Quantized
    from colqwen_lab.measure.environment import pick_device
    from colqwen_lab.model import quantize as autoround
    from colqwen_lab.model.checkpoint import default_checkpoint
    from colqwen_lab.model.config import VARIANTS, resolve_size

    recipe = autoround.Recipe(
        options.scheme.upper(), options.iters, options.samples, options.seqlen, options.format
    )
    device = pick_device()
    size = resolve_size(options.size, device.type == "cuda")
    checkpoint = default_checkpoint(VARIANTS["base"], size, options.weights, device)
    texts = autoround.calibration_file(options.texts) if options.texts else None
    default = outputs_folder() / f"{size}-{recipe.scheme}"
    folder = Path(options.output) if options.output else default
    overwrite = not options.output
    record = autoround.quantize(checkpoint, folder, recipe, device, texts, replace=overwrite)
    return Quantized(folder, record)


@takes(FidelityOptions)
def fidelity(options: FidelityOptions) -> Fidelities:
    """What each model loses in retrieval against BASE, on the same inputs, with intervals.

    Raises BadInput for a wrong value, MissingRequirement if there are no weights or no kernel here.
    """
    from colqwen_lab.analysis.fidelity import Fidelities
    from colqwen_lab.measure.sweep import to_stderr
    from colqwen_lab.retrieval.evaluate import evaluate

    records, corpus = evaluate(options, to_stderr)
    return Fidelities(tuple(records), options.margin, corpus)


@takes(SearchOptions)
def search_times(options: SearchOptions) -> SearchTimes:
    """Times of a MaxSim search over synthetic indexes, by format, pages, queries and kernel.

    Raises BadInput for a wrong value, MissingRequirement if no index fits the memory.
    """
    from colqwen_lab.analysis.index import SearchTimes
    from colqwen_lab.measure.sweep import to_stderr
    from colqwen_lab.retrieval.search import search_times

    return SearchTimes(tuple(search_times(options, to_stderr)))


def load(source: str | Path) -> Results:
    """The cells of a records file, of the report script's JSON, or of the word `published`.

    Raises BadInput if it is not a records file.
    """
    from colqwen_lab.analysis.table import Results

    return Results.load(source)


def predictions(results: Results) -> Predictions:
    """Each measured or published cell beside its prediction under the same settings."""
    from colqwen_lab.analysis.plan import Predictions
    from colqwen_lab.predict.plan import predictions

    return Predictions(tuple(results), tuple(predictions(results)))


def parameters(names: dict[str, Any], function: Any, *own: str) -> dict[str, Any]:
    """The arguments for `function` from a notebook's `globals()`; `own` names are the notebook's.

    The first call of a session raises BadInput for an unknown name, as a mistyped papermill `-p`.
    """
    for name in own:
        if not isinstance(value := names.get(name, ""), str):
            raise BadInput(f"{name} must be a text, got {value!r}{RAW}")
    options = function.options.model_fields
    valid = [*options, *own]
    known = {*valid, "In", "Out"}  # the last two are IPython's
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    others = (
        n for n, v in names.items() if n not in known and n[0] != "_" and isinstance(v, plain)
    )
    unknown = min(others, default="")
    if unknown and not names.get("_parameters_checked"):
        raise BadInput(f"unknown parameter {unknown!r}; valid: {', '.join(valid)}")
    names["_parameters_checked"] = True
    return {name: names[name] for name in options if name in names}


def escape(text: str) -> str:
    """`text` from a record for `Markdown`: one line, without markup or HTML."""
    from colqwen_lab.analysis import render

    return render.escape(text)


def save(item: Any, name: str = "") -> list[Path]:
    """The paths written under `outputs/`: a figure as NAME.png and NAME.svg, results as NAME.jsonl.

    A comparison becomes NAME.md. The default name is `figure`, `results` or `comparison`.
    """
    from colqwen_lab.analysis import plots
    from colqwen_lab.analysis.compare import Comparison
    from colqwen_lab.analysis.table import Results

    default = "figure" if hasattr(item, "savefig") else type(item).__name__.lower()
    stem = re.sub(r"[^\w.+-]", "-", name or default)
    if isinstance(item, (Results, Comparison)):
        kind = "jsonl" if isinstance(item, Results) else "md"
        return [item.save(outputs_folder() / f"{stem}.{kind}")]
    if not hasattr(item, "savefig"):
        raise BadInput(f"save takes a figure, results or a comparison, got {type(item).__name__}")
    return plots.save(item, stem, outputs_folder())


def __getattr__(name: str) -> Any:
    """`Results` and `__version__` on first use, which a start does not need."""
    if name == "Results":
        from colqwen_lab.analysis.table import Results

        return Results
    if name == "__version__":
        from importlib.metadata import version

        return version("colqwen-lab")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
