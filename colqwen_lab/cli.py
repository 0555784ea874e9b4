"""`colqwen-lab`: the package's functions from a shell, with the options declared in `options.py`.

Results go to stdout; progress and errors go to stderr, one line each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import colqwen_lab as lab
from colqwen_lab import signals
from colqwen_lab.errors import BadInput, LabError, printable
from colqwen_lab.options import (
    CompareOptions,
    FidelityOptions,
    Options,
    PlanOptions,
    QuantizeOptions,
    SearchOptions,
    SweepOptions,
    cards_of,
    joined,
)

INTERRUPTED = 130
KEYWORD = Parameter.KEYWORD_ONLY
METAVARS = {int: "INT", float: "FLOAT"}
# Options with a short flag, one with another name, and the positional ones.
FLAGS = {
    "model": ("-m", "--model"),
    "batch_sizes": ("-b", "--batch-sizes"),
    "configuration": ("-c", "--configuration"),
    "output": ("-o", "--output"),
    "cards": ("--card",),
}
POSITIONAL = ("base", "awq")

app = typer.Typer(
    help="What a quantised ColQwen3 costs and buys on your GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _parameter(name: str, field: Any) -> Parameter:
    """One option of a command, from its declaration in `options.py`.

    Values stay texts until the model checks them, so that one place words the errors.
    """
    default, flag = field.default, isinstance(field.default, bool)
    about = {"help": field.description, "show_default": default not in ("", False)}
    if name in POSITIONAL:
        return Parameter(name, KEYWORD, default=typer.Argument(default, **about), annotation=str)
    flags = FLAGS.get(name, (f"--{name.replace('_', '-')}",))
    metavar = None if flag else METAVARS.get(field.annotation, "TEXT")
    kind: Any = bool if flag else str
    value = default if flag else str(default)
    if any(getattr(part, "func", None) in (joined, cards_of) for part in field.metadata):
        kind, value = list[str], [default] if default else []
    value = typer.Option(value, *flags, metavar=metavar, **about)
    return Parameter(name, KEYWORD, default=value, annotation=kind)


def command(options: type[Options], *examples: str) -> Callable[..., Any]:
    """Register a function of these options, and of its own beside them, as a command."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = signature(function, eval_str=True).parameters.values()

        def run(**values: Any) -> None:
            extra = {parameter.name: values.pop(parameter.name) for parameter in own}
            texts = {k: ",".join(v) if isinstance(v, list) else v for k, v in values.items()}
            try:
                function(texts, **extra)
            except KeyboardInterrupt as stop:
                _end(str(stop) or "stopped")

        parameters = [_parameter(name, field) for name, field in options.model_fields.items()]
        parameters += [parameter.replace(kind=KEYWORD) for parameter in own]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        lines = "\n".join(f"  colqwen-lab {example}" for example in examples)
        app.command(epilog=f"\b\nExamples:\n{lines}")(run)
        return function

    return register


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(lab.__version__)
        raise typer.Exit


@app.command()
def variants() -> None:
    """List the models, and where their weights come from."""
    from colqwen_lab.model.config import SCHEMES, VARIANTS

    for variant in VARIANTS.values():
        typer.echo(f"{variant.name:8} {variant.description}")
        for size, repository in variant.hub.items():
            typer.echo(f"{'':8}   {size}: {repository.name} @ {repository.revision}")
        tiny = "quantised here on first use" if variant.scheme else "in the package"
        typer.echo(f"{'':8}   tiny: {tiny}")
    typer.echo(f"{'scheme':8} an AutoRound scheme by its name, {SCHEMES[0]} to {SCHEMES[-1]}")
    typer.echo(f"{'other':8} a checkpoint folder, or a hub id OWNER/NAME")


@app.command()
def doctor() -> None:
    """Show what this machine has: GPU, versions, kernels, cache, hub access."""
    from colqwen_lab.doctor import examine

    for what, state in examine():
        typer.echo(f"{what:22} {state}")


@command(
    SweepOptions,
    "sweep -m base -m awq -b 8,16,32 -o rows.jsonl",
    "sweep -m base,awq -c report -c best --control",
)
def sweep(
    options: dict[str, Any],
    price: Annotated[float, typer.Option(help="Price of a GPU-hour; adds what items cost.")] = 0,
) -> None:
    """Measure throughput and peak memory over batch sizes. Run again to resume."""
    results = lab.sweep(**options)
    costs = [results.costs(price)] if price else []
    _show(_tables(results.table(), *costs, results.end_to_end()))
    if not any(cell.status == "ok" for cell in results):
        raise lab.MissingRequirement("no cell could be measured; the rows say why")


@command(
    PlanOptions,
    "plan -m awq --card 8 --card 'RTX 4070'",
    "plan -m base,awq --size 8b -b 8,512 --json",
)
def plan(options: dict[str, Any], as_json: Json = False) -> None:
    """Predict peak memory, and the largest batch a card holds. Needs no GPU, weights or network."""
    result = lab.plan(**options)
    if not _printed(result, as_json):
        _show(_tables(result.table(), result.card_table(), result.rates()))


@command(
    CompareOptions, "compare rows.jsonl --card 8 --markdown report.md", "compare published --json"
)
def compare(
    options: dict[str, Any],
    markdown: Annotated[str, typer.Option(help="Write the report to this file; - is stdout.")] = "",
    as_json: Json = False,
) -> None:
    """Compare the models of one or two records files. Needs no GPU."""
    if markdown == "-" and as_json:
        raise BadInput("give --markdown - or --json, not both: each is a document on stdout")
    comparison = lab.compare(**options)
    if markdown == "-":
        _show(comparison.markdown())
    elif markdown:
        typer.echo(f"wrote {comparison.save(Path(markdown).expanduser())}", err=True)
    if not _printed(comparison, as_json) and not markdown:
        _show(comparison.text())


@command(FidelityOptions, "fidelity -m awq", "fidelity -m W8A16,W4A16 --plain --json")
def fidelity(options: dict[str, Any], as_json: Json = False) -> None:
    """Measure what quantising does to retrieval, against BASE, with intervals."""
    result = lab.fidelity(**options)
    if not _printed(result, as_json):
        _show(f"{_tables(result.table())}\n\n{result.verdict()}")


@command(
    SearchOptions,
    "search-times --formats bfloat16,int8",
    "search-times --pages 1000,10000 --queries 1 --kernel triton,torch",
)
def search_times(options: dict[str, Any], as_json: Json = False) -> None:
    """Measure how long a search of a synthetic index takes, by format and number of pages."""
    result = lab.search_times(**options)
    if not _printed(result, as_json):
        _show(f"{_tables(result.table(), result.million())}\n\n{result.verdict()}")


@command(QuantizeOptions, "quantize --scheme W8A16 -o my-w8", "quantize --size tiny --iters 0")
def quantize(options: dict[str, Any]) -> None:
    """Quantise the language model with AutoRound into a complete checkpoint folder."""
    result = lab.quantize(**options)
    _show(f"{result.folder}\n{_tables(result.summary())}")


@app.command(
    epilog="\b\nExamples:\n  colqwen-lab train-tiny -o my-tiny\n  colqwen-lab sweep -m my-tiny"
)
def train_tiny(
    output: Annotated[str, typer.Option("-o", "--output", help="A new folder.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
) -> None:
    """Train size tiny from scratch on synthetic pages, as its default weights were."""
    from colqwen_lab.retrieval import train

    record = train.train_tiny(Path(output), seed, progress=lambda line: typer.echo(line, err=True))
    typer.echo(json.dumps(record, indent=1))


def _printed(result: Any, as_json: bool) -> bool:
    """Print the result as one JSON document if `as_json`; returns whether it did."""
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
    return as_json


def _tables(*frames: Any) -> str:
    """Tables that fit the terminal; an empty one is skipped."""
    from colqwen_lab.analysis import render

    return "\n\n".join(render.text(frame) for frame in frames if len(frame))


def _show(text: str) -> None:
    """Print text from records, without control characters."""
    typer.echo(printable(text))


def main() -> None:
    """Run the program.

    Exit codes: 0, 1 missing requirement, 2 wrong value, 130 Ctrl-C, 143 SIGTERM.
    """
    signals.listen(signals.interrupt)
    warnings.formatwarning = lambda message, *_, **__: f"colqwen-lab: {message}\n"
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:
        # Without a file name it is standard output, which is full.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        where = error.filename or "standard output"
        _end(f"cannot use {where}: {error.strerror}; name another place for it", 1)
    except LabError as error:
        _end(str(error), error.exit_code)
    except Exception as error:
        # Usage errors: typer brings its own copy of click or uses the installed one.
        if not hasattr(error, "format_message"):
            raise
        hint = "--help lists the options"
        if "No such command" in str(error):
            group: Any = typer.main.get_command(app)
            hint = f"commands: {', '.join(group.commands)}"
        _end(f"{' '.join(error.format_message().split())}; {hint}", 2)
    if code == INTERRUPTED:  # typer turns Ctrl-C into a return value
        _end("stopped")
    signals.listen(signal.SIG_IGN)
    sys.exit(code)


def _end(line: str, code: int = 0) -> NoReturn:
    signals.end(f"colqwen-lab: {line}", code)
