"""`colqwen-lab`: the lab's functions from a shell. Results on stdout; progress and errors, a line each, on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import colqwen_lab as lab
from colqwen_lab.errors import BadInput, LabError, printable

app = typer.Typer(
    help="What a quantised ColQwen3 costs and buys on your GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130

Models = Annotated[
    list[str], typer.Option("-m", "--model", help="base, awq, W8A16 ..., a folder or a hub id.")
]
Size = Annotated[
    str, typer.Option("--size", help="auto (4b with a CUDA GPU, else tiny), tiny, mid, 4b, 8b.")
]
Weights = Annotated[
    str, typer.Option("--weights", help="auto, hub, random, or a checkpoint folder.")
]
Workload = Annotated[str, typer.Option("--workload", help="queries or pages.")]
VisualTokens = Annotated[
    int, typer.Option("--visual-tokens", help="Budget of a page's image, of 32 x 32 pixels each.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command()
def variants() -> None:
    """List what there is to compare, and where its weights come from."""
    from colqwen_lab.model.config import SCHEMES, VARIANTS

    for variant in VARIANTS.values():
        typer.echo(f"{variant.name:8} {variant.description}")
        for size, repository in variant.hub.items():
            typer.echo(f"{'':8}   {size}: {repository.name} @ {repository.revision}")
        made = (
            "quantised here from the default on first use" if variant.scheme else "in the package"
        )
        typer.echo(f"{'':8}   tiny: {made}")
    typer.echo(f"{'scheme':8} any of {SCHEMES[0]} ... {SCHEMES[-1]}, by its name")
    typer.echo(f"{'other':8} a checkpoint folder, or a hub id OWNER/NAME")


@app.command()
def doctor() -> None:
    """Say what this machine has: GPU, versions, kernels that could engage, cache, hub access, known-bad versions."""
    from colqwen_lab.doctor import examine

    for what, found in examine():
        typer.echo(f"{what:22} {found}")


@app.command()
def sweep(
    model: Models = ["awq"],  # noqa: B006  (typer's way to give a list a default)
    size: Size = "auto",
    batch_sizes: Annotated[
        str, typer.Option("-b", "--batch-sizes", help="8,16,32; auto: by workload.")
    ] = "auto",
    workload: Workload = "queries",
    texts: Annotated[str, typer.Option(help="report or natural queries.")] = "report",
    visual_tokens: VisualTokens = 1280,
    pages: Annotated[
        str, typer.Option(help="A folder, an image or a PDF; else drawn: A4, or such as 512x512.")
    ] = "",
    weights: Weights = "auto",
    execution: Annotated[
        str, typer.Option(help="eager, or fast: fused, in length buckets, CUDA graphs.")
    ] = "eager",
    backend: Annotated[
        str, typer.Option(help="Kernel: auto, torch, ark, tritonv2, humming; fast: fp8 ...")
    ] = "auto",
    protocol: Annotated[str, typer.Option(help="lean or published.")] = "lean",
    way: Annotated[
        list[str],
        typer.Option(
            "--way", help="Several ways in turn: report, best, EXECUTION/PROTOCOL/BACKEND."
        ),
    ] = [],  # noqa: B006
    control: Annotated[
        bool, typer.Option("--control", help="The first model twice, as an A/A control.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32.")] = "bfloat16",
    card: Annotated[
        str, typer.Option(help="GB or a GPU: the largest batch under its memory, on a bigger GPU.")
    ] = "",
    output: Annotated[str, typer.Option("-o", "--output", help="The records file, .jsonl.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is on file.")] = False,
    on: Annotated[str, typer.Option(help="here, or ray: over a Ray cluster.")] = "here",
    accelerator: Annotated[
        list[str], typer.Option(help="With ray, a GPU type such as A100; several times.")
    ] = [],  # noqa: B006
    address: Annotated[str, typer.Option(help="Of the Ray cluster; RAY_ADDRESS, else auto.")] = "",
) -> None:
    """Measure throughput and peak memory over batch sizes; several models are timed in turn. Resumes its file.

    Sizes, workloads and executions take several, --size tiny,mid: one after the other, or each a task --on ray.
    """
    results = lab.sweep(
        [name for names in model for name in names.split(",")],
        batch_sizes,
        size=size,
        workload=workload,
        texts=texts,
        visual_tokens=visual_tokens,
        pages=pages,
        weights=weights,
        execution=execution,
        backend=backend,
        protocol=protocol,
        ways=",".join(way),
        control=control,
        dtype=dtype,
        card=card,
        output=output,
        fresh=fresh,
        on=on,
        accelerator=",".join(accelerator),
        address=address,
    )
    _show(results.table().to_string())
    if not any(cell.status == "ok" for cell in results):
        raise lab.MissingRequirement("no cell could be measured; the rows say why")


@app.command()
def plan(
    model: Models = ["base", "awq"],  # noqa: B006
    size: Annotated[str, typer.Option("--size", help="tiny, mid, 4b, 8b.")] = "4b",
    batch_sizes: Annotated[
        str, typer.Option("-b", "--batch-sizes", help="Such as 8,512.")
    ] = "8,16,32,64,128,256,512",
    protocol: Annotated[str, typer.Option(help="lean or published.")] = "lean",
    card: Annotated[
        list[str], typer.Option("--card", help="Memory in GB, or a GPU's name; several times.")
    ] = [],  # noqa: B006
    kernel: Annotated[
        str,
        typer.Option(
            help="How weights are multiplied: tritonv2, torch, fused; fast: also int4, fp8."
        ),
    ] = "tritonv2",
    execution: Annotated[str, typer.Option(help="eager or fast.")] = "eager",
    workload: Workload = "queries",
    visual_tokens: VisualTokens = 1280,
    tokens: Annotated[
        int, typer.Option(help="Tokens of every item; 0: the report's queries, or A4 pages.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Predict peak memory, and the largest batch a card holds. Needs no GPU, no weights, no network."""
    options: dict[str, Any] = {
        "protocol": protocol,
        "kernel": kernel,
        "workload": workload,
        "visual_tokens": visual_tokens,
    }
    made = lab.plan(
        model, batch_sizes, size=size, cards=card, tokens=tokens, execution=execution, **options
    )
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=1))
    else:
        _show(
            *(
                frame.to_string(index=False)
                for frame in (made.table(), made.card_table())
                if len(frame)
            )
        )


@app.command()
def compare(
    base: Annotated[
        str, typer.Argument(help="A records file that holds BASE, or the word published.")
    ],
    awq: Annotated[
        str, typer.Argument(help="One that holds the quantised model; else the same.")
    ] = "",
    card: Annotated[
        list[str], typer.Option("--card", help="GB, or a GPU's name; several times.")
    ] = ["8,12,16,24"],  # noqa: B006
    markdown: Annotated[str, typer.Option(help="Write the report to this file.")] = "",
    as_json: Json = False,
) -> None:
    """Compare two series at equal batch: overhead, memory, cards, crossover, recommendations. Needs no GPU."""
    comparison = lab.compare(base, awq, ",".join(card))
    if markdown:
        try:
            Path(markdown).write_text(comparison.markdown(), encoding="utf-8")
        except OSError as error:
            raise BadInput(
                f"cannot write {markdown}: {error.strerror}; name a file in a folder you can write"
            ) from None
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=1))
    elif not markdown:
        typer.echo(comparison.markdown())


@app.command()
def fidelity(
    model: Models = ["awq"],  # noqa: B006
    size: Size = "auto",
    data: Annotated[
        str, typer.Option(help="generated, vidore:NAME, or a folder in BEIR layout.")
    ] = "generated",
    weights: Annotated[
        str, typer.Option(help="BASE's: auto, hub, or a checkpoint folder.")
    ] = "auto",
    iters: Annotated[
        int, typer.Option(help="Tuning steps a layer of what is quantised here; 0 is plain.")
    ] = 50,
    plain: Annotated[
        bool, typer.Option("--plain", help="Each scheme quantised here also without tuning.")
    ] = False,
    margin: Annotated[float, typer.Option(help="A difference below this is none.")] = 0.01,
    queries: Annotated[int, typer.Option(help="How many at most; 0 means all.")] = 0,
    pages: Annotated[int, typer.Option(help="How many at most; 0 means all.")] = 0,
    visual_tokens: Annotated[int, typer.Option(help="The budget of a page.")] = 1280,
    output: Annotated[str, typer.Option("-o", "--output", help="The records file, .jsonl.")] = "",
    as_json: Json = False,
) -> None:
    """What quantising does to retrieval: rankings, scores and embeddings against BASE's, with intervals."""
    found = lab.fidelity(
        [name for names in model for name in names.split(",")],
        data,
        size=size,
        weights=weights,
        iters=iters,
        plain=plain,
        margin=margin,
        queries=queries,
        pages=pages,
        visual_tokens=visual_tokens,
        output=output,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _show(found.table().to_string(index=False), found.verdict())


@app.command()
def quantize(
    size: Size = "auto",
    scheme: Annotated[
        str, typer.Option(help="An AutoRound scheme: W4A16, W8A16, W2A16G32 ...")
    ] = "W4A16",
    weights: Weights = "auto",
    iters: Annotated[int, typer.Option(help="Tuning steps a layer; 0 is plain rounding.")] = 50,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens a sample.")] = 64,
    format: Annotated[
        str, typer.Option(help="Packing: auto_round, auto_gptq, auto_awq.")
    ] = "auto_round",
    texts: Annotated[str, typer.Option(help="A file of calibration texts, one a line.")] = "",
    output: Annotated[str, typer.Option("-o", "--output", help="A new folder.")] = "",
) -> None:
    """Quantise the text tower with AutoRound into a complete checkpoint folder."""
    options = {"weights": weights, "format": format, "texts": texts, "output": output}
    made = lab.quantize(size, scheme, iters=iters, samples=samples, seqlen=seqlen, **options)
    typer.echo(f"{made.folder}\n{made.summary().to_string()}")


@app.command()
def train_tiny(
    output: Annotated[str, typer.Option("-o", "--output", help="A new folder.")],
    seed: Annotated[int, typer.Option(help="What weights and batches hang on.")] = 0,
) -> None:
    """Train size tiny from scratch on drawn pages, as its default weights were: minutes on two cores of a CPU."""
    from colqwen_lab.retrieval import train

    record = train.train_tiny(Path(output), seed, progress=lambda line: typer.echo(line, err=True))
    typer.echo(json.dumps(record, indent=1))


def _show(*blocks: str) -> None:
    """Print texts made of records, without what a terminal would obey."""
    typer.echo(printable("\n\n".join(blocks)))


def main() -> None:
    """The program. Exit codes: 0, 1 for an unmet need, 2 for a wrong value; either is one line on stderr."""
    warnings.formatwarning = lambda message, *_, **__: f"colqwen-lab: {message}\n"
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except LabError as error:
        _end(str(error), error.exit_code)
    except Exception as error:
        # Usage errors: typer brings its own copy of click or uses the installed one, by its version.
        if not hasattr(error, "format_message"):
            raise
        names = (
            str(command.callback.__name__)
            for command in app.registered_commands
            if command.callback
        )
        commands = ", ".join(names).replace("_", "-")
        hint = (
            f"commands: {commands}"
            if "No such command" in str(error)
            else "--help lists what it takes"
        )
        _end(f"{' '.join(error.format_message().split())}; {hint}", 2)
    if code == INTERRUPTED:  # typer turns Ctrl-C into a return value
        _end(
            "interrupted; the rows measured so far are on file, and the same command goes on from there",
            code,
        )
    sys.exit(code)


def _end(line: str, code: int) -> NoReturn:
    print(f"colqwen-lab: {line}", file=sys.stderr)
    sys.exit(code)
