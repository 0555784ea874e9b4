"""What a quantised ColQwen3 costs and buys on your GPU.

    import colqwen_lab as lab
    results = lab.sweep("base,awq")      # measure, one row a batch size, kept in outputs/
    results.table(), results.plot()
    lab.compare(results)                 # overhead, memory, cards, recommendations
    lab.compare("published")

Importing it, and everything that works from records alone, starts without torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colqwen_lab.errors import BadInput, LabError, MissingRequirement, checked, one_of
from colqwen_lab.settings import outputs_folder

# Progress is plain lines here; tqdm in a notebook without ipywidgets would print a warning with a path.
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    import pandas as pd

    from colqwen_lab.analysis.compare import Comparison, SideBySide
    from colqwen_lab.analysis.fidelity import Fidelities
    from colqwen_lab.analysis.plan import Plan
    from colqwen_lab.analysis.quantized import Quantized
    from colqwen_lab.analysis.results import Results

__all__ = [
    "BadInput",
    "LabError",
    "MissingRequirement",
    "Results",
    "beside",
    "compare",
    "escape",
    "explain",
    "fidelity",
    "load",
    "outputs_folder",
    "parameters",
    "plan",
    "predictions",
    "quantize",
    "save",
    "sweep",
]


@checked
def sweep(
    model: str | Sequence[str] = "awq",
    batch_sizes: str | int | Iterable[int] = "auto",
    *,
    size: str = "auto",
    workload: str = "queries",
    texts: str = "report",
    visual_tokens: int = 1280,
    pages: str = "",
    weights: str = "auto",
    execution: str = "eager",
    backend: str = "auto",
    protocol: str = "lean",
    ways: str = "",
    control: bool = False,
    dtype: str = "bfloat16",
    card: str | float = "",
    output: str = "",
    fresh: bool = False,
    min_steps: int = 0,
    max_s: float = 3.0,
    on: str = "here",
    accelerator: str = "",
    address: str = "",
) -> Results:
    """Throughput and peak memory of each model at each batch size, measured here; cells on file already are kept.

    Args:
        model: base, awq, an AutoRound scheme such as W8A16, a folder, a hub id; or several, "base,awq", timed in turn.
        batch_sizes: "8,16", 8 or [8, 16]; auto is 8,16,32,64,128,256 queries, or 1,2,4 pages.
        size: auto (4b where there is a CUDA GPU, else tiny), tiny, mid, 4b, 8b; or several, "tiny,mid".
        workload: queries or pages; or both.
        texts: of queries: report (the report's formula) or natural (distinct queries of several lengths).
        visual_tokens: of pages: the budget of an image, a visual token being 32 x 32 pixels.
        pages: a folder of images, an image, or a PDF; by default A4 pages that the lab draws, or in the size
            WIDTHxHEIGHT, "512x512".
        weights: auto (tiny: its default; else the hub), hub, random, or a checkpoint folder.
        execution: eager (the forward of transformers) or fast (fused, in length buckets, as CUDA graphs on a GPU); or
            both, "eager,fast": sizes, workloads and executions are measured one after the other, `ways` in turn.
        backend: the kernel for packed weights: auto, or a name such as torch, ark, tritonv2, marlin, humming; in
            execution fast also int4, and with 8-bit activations fp8 (16-bit weights), w4-fp8, w4-int8 (packed ones).
        protocol: lean (no KV cache, last output released) or published (as the report was made).
        ways: instead of these three several ways, all timed in turn: report (as the report was made), best, or
            EXECUTION/PROTOCOL/BACKEND; "report,best".
        control: time the first model of each way twice, as an A/A control.
        dtype: bfloat16, float16 or float32.
        card: memory in GB or a GPU's name: instead of `batch_sizes`, find the largest batch under that card's memory,
            on a bigger GPU. The throughput is then this GPU's under the cap, not the card's.
        output: the records file; by default one under outputs/ named after the models.
        fresh: measure again what is on file; the old rows move aside.
        min_steps: timed steps a cell, at least; 0 means 10 of queries, 6 of pages.
        max_s: seconds a cell is timed, at most, once it has its steps.
        on: here, or ray: over a Ray cluster, every size, workload and execution a task, its rows sent to this file.
        accelerator: with ray, the types of GPU to measure all of it on, "A100,L4"; by default the cluster's only one.
        address: with ray, the cluster's: auto, HOST:PORT, ray://HOST:PORT; by default RAY_ADDRESS, else auto.

    Raises:
        BadInput: a wrong value; the message names the valid ones.
        MissingRequirement: no weights, or no kernel for them, here; no Ray cluster.
    """
    from colqwen_lab.analysis.results import Results
    from colqwen_lab.hardware import find_card
    from colqwen_lab.measure import cluster
    from colqwen_lab.measure.timing import StoppingRule
    from colqwen_lab.runtime.batches import WORKLOADS

    def patience(workload: str) -> StoppingRule:
        least = min_steps or WORKLOADS[one_of("workload", workload, WORKLOADS)].min_steps
        return StoppingRule(
            min_steps=least, max_steps=max(200, least), min_s=min(0.3, max_s), max_s=max_s
        )

    options: dict[str, Any] = {
        "size": size,
        "workload": workload,
        "texts": texts,
        "weights": weights,
    }
    options |= {"visual_tokens": visual_tokens, "pages": pages}
    options |= {
        "execution": execution,
        "backend": backend,
        "protocol": protocol,
        "dtype": dtype,
        "fresh": fresh,
    }
    options |= {"ways": ways, "control": control}
    options |= {
        "output": Path(output) if output else None,
        "card": find_card(card) if card != "" else None,
    }
    options |= {"patience": patience}
    if one_of("place to sweep on", on, ("here", "ray")) == "ray":
        return Results(
            tuple(
                cluster.on_ray(
                    model, batch_sizes, accelerators=accelerator, address=address, **options
                )
            )
        )
    if accelerator or address:
        raise BadInput("accelerator and address are a cluster's; valid: with --on ray")
    return Results(tuple(cluster.in_turn(cluster.matrix(model, batch_sizes, **options))))


def load(source: str | Path) -> Results:
    """The cells of a records file, of the report's own script's JSON, or of the report (`published`).

    Raises:
        BadInput: not a records file.
    """
    from colqwen_lab.analysis.results import Results

    return Results.load(source)


@checked
def compare(
    base: str | Path | Results = "published",
    awq: str | Path | Results = "",
    cards: str | Sequence[float] = (8, 12, 16, 24),
) -> Comparison | SideBySide:
    """Overhead and memory saving at every shared batch, card scenarios, crossover and recommendations.

    Of files with several devices, sizes, workloads, executions, protocols, models or kernels one each, side by side.

    Args:
        base: results or a records file that holds BASE, or `published`.
        awq: results or a records file that holds the quantised model; by default the same.
        cards: memory budgets in GB, [8, 12] or "8,12".

    Raises:
        BadInput: not records, or series that cannot be compared at equal batch.
    """
    from colqwen_lab.analysis.compare import by_place as run
    from colqwen_lab.analysis.results import Results

    for value in (base, awq):
        if not isinstance(value, (str, Path, Results)):
            raise BadInput(
                f"{value!r} is no records; valid: results, a records file, or the word published"
            )
    first = base if isinstance(base, Results) else load(base)
    if awq == "" and len(first.variants) == 1:
        raise BadInput(
            f"only {first.variants[0]} is in there; valid: records of two models, or a second file"
        )
    second = first if awq == "" else awq if isinstance(awq, Results) else load(awq)
    return run(first, second, card_budgets(cards))


@checked
def plan(
    model: str | Sequence[str] = "base,awq",
    batch_sizes: str | int | Iterable[int] = "8,16,32,64,128,256,512",
    *,
    size: str = "4b",
    cards: str | float | Sequence[float | str] = "8,12,16,24",
    protocol: str = "lean",
    kernel: str = "tritonv2",
    dtype: str = "bfloat16",
    workload: str = "queries",
    visual_tokens: int = 1280,
    tokens: int = 0,
    execution: str = "eager",
) -> Plan:
    """Predicted peak memory of each model at each batch size, and the largest batch each card holds. Needs no GPU.

    Args:
        model: base, awq, an AutoRound scheme such as W8A16, or several.
        batch_sizes: "8,16", 8 or [8, 16].
        size: tiny, mid, 4b, 8b.
        cards: memory in GB or GPUs by name, "8,RTX 4070".
        protocol: lean or published.
        kernel: how packed weights are multiplied: tritonv2 (dequantise a weight, then multiply), torch, fused; in
            execution fast also int4 (a CPU's) and, for 16-bit weights, fp8.
        dtype: bfloat16, float16 or float32.
        workload: queries or pages.
        visual_tokens: of pages: the budget of an image.
        tokens: tokens of every item; 0 means the report's queries, or A4 pages.
        execution: eager or fast.

    Raises:
        BadInput: a wrong value; the message names the valid ones.
    """
    from colqwen_lab.analysis.plan import Plan
    from colqwen_lab.analysis.results import Results
    from colqwen_lab.hardware import find_card
    from colqwen_lab.model.config import SIZES
    from colqwen_lab.predict.plan import plan as run
    from colqwen_lab.records import batch_sizes_of, listed

    one_of("size", size, SIZES)
    if tokens < 0:
        raise BadInput(
            f"tokens {tokens}; valid: 0 for the report's queries or A4 pages, or 1 or more"
        )
    budgets = [find_card(card) for card in listed(cards) if card != ""]
    how: dict[str, Any] = {
        "tokens": tokens or None,
        "workload": workload,
        "visual_tokens": visual_tokens,
        "execution": execution,
    }
    cells, found = run(
        listed(model), size, batch_sizes_of(batch_sizes), budgets, protocol, dtype, kernel, **how
    )
    return Plan(Results(tuple(cells)), tuple(found))


def predictions(results: Results) -> Results:
    """Predicted cells under the settings of measured or published ones, where their kernel is modelled."""
    from colqwen_lab.analysis.results import Results
    from colqwen_lab.predict.plan import predictions as run

    return Results(tuple(cell for cell in run(results) if cell))


def beside(results: Results) -> pd.DataFrame:
    """Each measured or published row beside its prediction: the peak with its error, the rate with its limit."""
    from colqwen_lab.analysis.plan import beside as table
    from colqwen_lab.predict.plan import predictions as run

    return table(results, run(results))


def explain(results: Results) -> Results:
    """Measured or published cells with the ledger of their prediction; what that lacks is a part of its own."""
    from colqwen_lab.analysis.plan import explained
    from colqwen_lab.predict.plan import predictions as run

    return explained(results, run(results))


def card_budgets(cards: str | float | Sequence[float | str]) -> list[float]:
    """Budgets in GB from "8,12", 8, [8, 12] or GPUs by name, "RTX 4070,24". Raises BadInput."""
    from colqwen_lab.hardware import find_card
    from colqwen_lab.records import GIB, listed

    return [find_card(card).nominal_bytes / GIB for card in listed(cards)]


@checked
def quantize(
    size: str = "auto",
    scheme: str = "W4A16",
    *,
    weights: str = "auto",
    iters: int = 50,
    samples: int = 64,
    seqlen: int = 64,
    format: str = "auto_round",
    texts: str = "",
    output: str = "",
) -> Quantized:
    """A complete AutoRound checkpoint of the text tower, and its record: bytes, and each layer's weight error.

    Args:
        size: auto (4b where there is a CUDA GPU, else tiny), tiny, mid, 4b, 8b.
        scheme: an AutoRound scheme: W4A16 (group 128), W8A16, W2A16, W4A16G32, ...
        weights: the 16-bit weights to start from: auto, hub, random, or a checkpoint folder.
        iters: tuning steps a layer; 0 is plain rounding.
        samples: calibration samples.
        seqlen: tokens a sample.
        format: the packing: auto_round, auto_gptq, auto_awq.
        texts: a file of calibration texts, one a line; by default those in the package.
        output: a new folder; by default `outputs/SIZE-SCHEME`, made again if it is there.

    Raises:
        BadInput: a wrong value; the message names the valid ones.
        MissingRequirement: no weights, or the result would not be complete.
    """
    from colqwen_lab.analysis.quantized import Quantized
    from colqwen_lab.measure.environment import pick_device
    from colqwen_lab.model import quantize as maker
    from colqwen_lab.model.checkpoint import default_checkpoint
    from colqwen_lab.model.config import VARIANTS, resolve_size

    recipe = maker.Recipe(scheme.upper(), iters, samples, seqlen, format)
    device = pick_device()
    size = resolve_size(size, device.type == "cuda")
    source = default_checkpoint(VARIANTS["base"], size, weights, device)
    lines = maker.calibration_file(texts) if texts else None
    folder = Path(output) if output else outputs_folder() / f"{size}-{recipe.scheme}"
    return Quantized(
        folder, maker.quantize(source, folder, recipe, device, lines, replace=not output)
    )


@checked
def fidelity(
    model: str | Sequence[str] = "awq",
    data: str = "generated",
    *,
    size: str = "auto",
    weights: str = "auto",
    iters: int = 50,
    plain: bool = False,
    margin: float = 0.01,
    queries: int = 0,
    pages: int = 0,
    visual_tokens: int = 1280,
    output: str = "",
) -> Fidelities:
    """What each model loses of retrieval against BASE, on the same queries and pages, with intervals and verdicts.

    Args:
        model: awq, an AutoRound scheme such as W8A16, a folder, a hub id; or several.
        data: generated (pages drawn by the lab, held out of training), vidore:NAME, or a folder in BEIR layout.
        size: auto (4b where there is a CUDA GPU, else tiny), tiny, mid, 4b, 8b.
        weights: BASE's: auto (tiny: its default; else the hub), hub, or a checkpoint folder.
        iters: tuning steps a layer of the schemes that are quantised here, to 1000; 0 is plain rounding.
        plain: each of these also without tuning.
        margin: a difference below this is none; nDCG, recall, overlap, tau and cosine end at 1.
        queries: how many at most; 0 means all.
        pages: how many at most; 0 means all.
        visual_tokens: the budget of a page.
        output: the records file; by default one under outputs/ named after the models.

    Raises:
        BadInput: a wrong value; the message names the valid ones.
        MissingRequirement: no weights, or no kernel for them, here.
    """
    from colqwen_lab.analysis.fidelity import Fidelities, check_margin
    from colqwen_lab.measure.environment import pick_device
    from colqwen_lab.measure.sweep import to_stderr
    from colqwen_lab.model.config import resolve_size
    from colqwen_lab.model.synthetic import SMALL_WIDTH, WIDTH
    from colqwen_lab.records import listed
    from colqwen_lab.retrieval import data as sets
    from colqwen_lab.retrieval import run

    check_margin(margin)
    device = pick_device()
    size = resolve_size(size, device.type == "cuda")
    asked = run.subjects(listed(model), size, iters, plain)
    corpus = sets.load(data, queries, pages, SMALL_WIDTH if size == "tiny" else WIDTH, to_stderr)
    names = "-".join(dict.fromkeys(one.variant.name for one in asked[1:])) or "base"
    stem = f"fidelity-{names}-{size}-{data}".replace("/", "-").replace(":", "-")
    path = Path(output) if output else outputs_folder() / f"{stem}.jsonl"
    records = run.run(asked, corpus, size, weights, visual_tokens, device, path, to_stderr)
    return Fidelities(tuple(records), margin, corpus)


def parameters(names: dict[str, Any], function: Callable[..., Any], *own: str) -> dict[str, Any]:
    """The arguments for `function` among a notebook's `globals()`, whose parameters cell names them and its `own`.

    The first call of a session also checks that nothing else was set; after that, a notebook has names of its own.

    Raises:
        BadInput: a plain value that is no parameter of `function`, as papermill injects for a mistyped `-p`.
    """
    valid = [*signature(function).parameters, *own]
    plain = (str, int, float, bool, list, tuple, type(None))
    given = {
        name for name, value in names.items() if name[0] != "_" and isinstance(value, plain)
    } - {"In"}
    unknown = sorted(given - set(valid))
    if unknown and not names.get("_parameters_checked"):
        raise BadInput(f"unknown parameter {unknown[0]!r}; valid: {', '.join(valid)}")
    names["_parameters_checked"] = True
    return {name: names[name] for name in valid if name in given and name not in own}


def __getattr__(name: str) -> Any:
    """`Results`, on first use: it brings records, which a start does not need."""
    if name == "Results":
        from colqwen_lab.analysis.results import Results

        return Results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def escape(text: str) -> str:
    """What a record says, for `Markdown`: shown as it is, on one line, neither markup nor HTML."""
    from colqwen_lab.analysis.render import escape as run

    return run(text)


def save(figure: Any, name: str) -> list[Path]:
    """Save a figure as NAME.png and NAME.svg under `outputs/`; the files. Raises BadInput if they cannot be written."""
    from colqwen_lab.analysis import plots

    return plots.save(figure, name.replace("/", "-"), outputs_folder())
