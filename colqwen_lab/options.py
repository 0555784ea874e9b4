"""Every option of every command, declared once: type, default, valid values and help.

The command line (`cli.py`), the Python functions (`__init__.py`) and the parameters cells of the
notebooks derive from these models. The text under an option is its help. papermill passes texts:
"false" and "8,16" are understood.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial, wraps
from inspect import Parameter, Signature
from typing import Annotated, Any, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from colqwen_lab.errors import BadInput, ambiguous, one_of, unknown
from colqwen_lab.hardware import Card, find_card
from colqwen_lab.model.config import check_size
from colqwen_lab.records import EIGHT_BIT_KERNELS, Configuration

EXECUTIONS = ("eager", "fast")
PROTOCOLS = ("lean", "published")
DTYPES = ("bfloat16", "float16", "float32")
TEXTS = ("report", "natural")
WEIGHTS = ("auto", "hub", "random")
FORMATS = ("auto_round", "auto_gptq", "auto_awq")
VISUAL_TOKENS = 1280
MOST_VISUAL_TOKENS = 16_384


class WorkloadDefaults(NamedTuple):
    """What a sweep of a workload measures unless told: batch sizes, and the fewest timed steps.

    A page costs as much as seventy queries; six steps are the fewest that give an interval.
    """

    batch_sizes: tuple[int, ...]
    min_steps: int


WORKLOADS = {
    "queries": WorkloadDefaults((8, 16, 32, 64, 128, 256), 10),
    "pages": WorkloadDefaults((1, 2, 4), 6),
}
# The report's configuration, with its fallback kernel by device, and the best one.
REPORT = {"cuda": "eager/published/tritonv2", "cpu": "eager/published/torch"}
BEST = "fast/lean/auto"


# ---------------------------------------------------------------- types

RAW = "; papermill -r passes a text as it is, where -p makes 7 of 007"


def listed(value: Any) -> list[Any]:
    """The items of "a,b", of a list, or of one value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, dict) or not isinstance(value, Iterable):
        return [value]
    return list(value)


def joined(value: Any) -> str:
    """The items of a text or a list of texts as one text, "a,b"."""
    parts = listed(value)
    if not all(isinstance(part, str) for part in parts):
        raise BadInput(f"must be a text such as 'a,b' or a list of texts, got {value!r}{RAW}")
    return ",".join(part.strip() for part in parts)


def batch_sizes_of(value: Any) -> tuple[int, ...]:
    """Batch sizes from "8,16", 8 or [8, 16]; `auto` is (), the workload's default, as is `none`.

    Raises BadInput for other than different whole numbers of 1 or more.
    """
    if value in ("auto", "none", "", ()):
        return ()
    parts = listed(value.strip("[ ]") if isinstance(value, str) else value)
    texts = [str(part).strip() for part in parts]
    sizes = [int(text) for text in texts if text.isdecimal() and len(text) < 19]
    if not sizes or len(sizes) < len(texts) or min(sizes) < 1 or len({*sizes}) < len(sizes):
        raise BadInput(f"must be different whole numbers of 1 or more, such as 8,16, got {value!r}")
    return tuple(sizes)


def _choice(*valid: str) -> AfterValidator:
    return AfterValidator(partial(one_of, "value", valid=valid))


def _each(check: Callable[[str], str]) -> AfterValidator:
    """Check every item of a text "a,b"; a repeated item is dropped."""
    return AfterValidator(lambda value: ",".join(dict.fromkeys(map(check, value.split(",")))))


def cards_of(value: Any) -> str:
    """Checked cards as one text, "8,RTX 4070", from texts and numbers."""
    parts = [str(part) if type(part) in (int, float) else part for part in listed(value)]
    for name in listed(names := joined(parts)):
        find_card(name)
    return names


def _weights(value: str) -> str:
    if value not in WEIGHTS and not os.path.isdir(value):
        raise BadInput(f"must be {', '.join(WEIGHTS)} or a checkpoint folder, got {value!r}")
    if value in WEIGHTS and os.path.exists(os.path.join(value, "config.json")):
        raise ambiguous(value, "a kind of weights")
    return value


def _data(value: str) -> str:
    if value == "generated" and os.path.exists(value):
        raise ambiguous(value, "the synthetic pages")
    return value


Several = Annotated[str, BeforeValidator(joined)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
BatchSizes = Annotated[
    tuple[int, ...], BeforeValidator(batch_sizes_of), Field(validate_default=True)
]
Cards = Annotated[str, BeforeValidator(cards_of)]
Weights = Annotated[PathText, AfterValidator(_weights)]
Protocol = Annotated[str, _choice(*PROTOCOLS)]
VisualTokens = Annotated[int, Field(ge=1, le=MOST_VISUAL_TOKENS)]
# Options of several commands, with their help.
SIZE_HELP = "auto (4b with a CUDA GPU, else tiny), tiny, mid, 4b, 8b"
Size = Annotated[str, AfterValidator(check_size), Field(description=SIZE_HELP)]
Dtype = Annotated[str, _choice(*DTYPES), Field(description="bfloat16, float16 or float32")]
RecordsPath = Annotated[
    PathText, Field(description="the records file, .jsonl; by default under outputs/")
]


class Options(BaseModel):
    """The options of one command. A wrong value raises BadInput with the valid ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Checked options from names and values."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise BadInput(_message(cls, error.errors()[0])) from None

    @property
    def models(self) -> list[str]:
        """The names of the variants, for a command on `model`."""
        return listed(self.model)  # type: ignore[attr-defined]

    @property
    def memory_budgets(self) -> list[Card]:
        """The cards to fit, for a command on `cards`."""
        return [find_card(card) for card in listed(self.cards)]  # type: ignore[attr-defined]


KINDS = {"bool": "True or False", "int": "a whole number", "float": "a number", "string": "a text"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _message(options: type[Options], error: ErrorDetails) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    cause = error.get("ctx", {}).get("error")
    if error["type"] == "extra_forbidden":
        return str(unknown("option", name, options.model_fields))
    if isinstance(cause, BadInput):
        text = str(cause).replace("unknown value", f"unknown {name}", 1)
        return f"{name} {text}" if text.startswith("must be") else text
    kind = next((text for key, text in KINDS.items() if error["type"].startswith(key)), "")
    if error["type"].startswith(("greater", "less")):
        parts, bounds = options.model_fields[name].metadata, BOUNDS.items()
        limits = [(words, getattr(part, key, None)) for part in parts for key, words in bounds]
        kind = " and ".join(f"{words} {bound}" for words, bound in limits if bound is not None)
    expected = kind or error["msg"].removeprefix("Input should be ")
    default = options.model_fields[name].default
    hint = RAW if kind == "a text" else ""
    return f"{name} must be {expected}, such as {default!r}, got {error['input']!r}{hint}"


Checked = TypeVar("Checked", bound=Options)


def takes(options: type[Checked]) -> Callable[[Callable[[Checked], Any]], Callable[..., Any]]:
    """A decorator: a function of `options` is called by their names, which its signature shows.

    The first two options may be given by position.
    """
    fields = options.model_fields
    kinds = [Parameter.POSITIONAL_OR_KEYWORD] * 2 + [Parameter.KEYWORD_ONLY] * len(fields)
    parameters = [
        Parameter(name, kind, default=field.default)
        for (name, field), kind in zip(fields.items(), kinds, strict=False)
    ]
    arguments = "\n".join(f"        {name}: {field.description}" for name, field in fields.items())

    def decorate(function: Callable[[Checked], Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 2 or {*list(fields)[: len(args)]} & kwargs.keys():
                raise BadInput(
                    f"{function.__name__} takes its options by name: {', '.join(fields)}"
                )
            return function(options.of(dict(zip(fields, args, strict=False)) | kwargs))

        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n    Args:\n{arguments}\n    "
        call.options = options  # type: ignore[attr-defined]
        return call

    return decorate


# ---------------------------------------------------------------- the commands


class SweepOptions(Options):
    """Options of `sweep`. `size`, `workload` and `execution` take several values: a matrix."""

    model: Several = Field(
        "awq",
        description="base, awq, an AutoRound scheme such as W8A16, a checkpoint folder or a hub "
        "id; several are interleaved: base,awq",
    )
    batch_sizes: BatchSizes = "auto"  # type: ignore[assignment]
    """such as 8,16; auto is 8 to 256 queries, or 1,2,4 pages"""
    size: Annotated[Several, _each(check_size)] = Field("auto", description=SIZE_HELP)
    workload: Annotated[Several, _each(partial(one_of, "value", valid=WORKLOADS))] = "queries"
    """queries or pages"""
    texts: Annotated[str, _choice(*TEXTS)] = "report"
    """queries: report (the report's formula) or natural (several lengths)"""
    visual_tokens: VisualTokens = VISUAL_TOKENS
    """pages: the budget of an image, in visual tokens of 32 x 32 pixels"""
    pages: PathText = ""
    """pages: a folder, an image or a PDF; else synthetic A4 pages, or WIDTHxHEIGHT pixels"""
    loaders: BatchSizes = "none"  # type: ignore[assignment]
    """pages: also time them from disk to disk, read by so many processes, such as 1,8"""
    weights: Weights = "auto"
    """auto (tiny: built in, else the hub), hub, random, or a folder"""
    execution: Annotated[Several, _each(partial(one_of, "value", valid=EXECUTIONS))] = "eager"
    """eager (transformers' forward) or fast (fused, length buckets, CUDA graphs)"""
    kernel: str = Field(
        "auto",
        description="kernel of packed weights: auto, torch, ark, tritonv2, marlin, humming; fast: "
        "also int4, and with 8-bit activations fp8, w4-fp8, w4-int8",
    )
    protocol: Protocol = "lean"
    """lean (no KV cache, last output released) or published (as the report was made)"""
    configuration: Several = ""
    """several configurations, interleaved: report, best, or EXECUTION/PROTOCOL/KERNEL"""
    control: bool = False
    """A/A control: time the first model twice; both must be the same"""
    dtype: Annotated[str, _choice("auto", *DTYPES)] = "auto"
    """auto (bfloat16; float32 on a CPU that multiplies it faster), bfloat16, float16 or float32"""
    card: Annotated[str, BeforeValidator(str)] = ""
    """find the largest batch under the memory of this card (GB or a GPU's name)"""
    output: RecordsPath = ""
    fresh: bool = False
    """measure again what is on file"""
    min_steps: Annotated[int, Field(ge=0)] = 0
    """fewest timed steps of a cell; 0 is 10 for queries, 6 for pages"""
    max_s: Annotated[float, Field(gt=0)] = 3.0
    """seconds to time a cell, once every batch was timed"""
    on: Annotated[str, _choice("here", "ray")] = "here"
    """here, or ray: over a Ray cluster, one task per size, workload and execution"""
    accelerator: Several = ""
    """ray: GPU types to measure on, such as A100,L4"""
    address: str = ""
    """ray: the cluster's address; by default RAY_ADDRESS, else auto"""

    def model_post_init(self, _: Any) -> None:
        names, workloads = self.models, self.workload.split(",")
        if not names or len(set(names)) < len(names):
            raise BadInput(f"model must be one or more different models, got {self.model!r}")
        own = self.pages or self.loaders or self.visual_tokens != VISUAL_TOKENS
        if "pages" not in workloads and own:
            raise BadInput("pages, loaders and visual_tokens are options of workload pages")
        if "queries" not in workloads and self.texts != "report":
            raise BadInput("texts is an option of workload queries")
        if self.weights not in WEIGHTS and len(names) > 1:
            raise BadInput("a weights folder goes with one model; name folders as models")
        if self.on == "here" and (self.accelerator or self.address):
            raise BadInput("accelerator and address are options of a Ray cluster, on=ray")
        single = (self.execution, self.protocol, self.kernel)
        if self.configuration and single != ("eager", "lean", "auto"):
            raise BadInput("give configuration, or execution, protocol and kernel, not both")
        self.configurations("cpu")  # checks each configuration
        self.memory_budget  # noqa: B018  (checks the card's name)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, or the workload's default ones."""
        return self.batch_sizes or WORKLOADS[self.workload].batch_sizes

    @property
    def memory_budget(self) -> Card | None:
        """The card whose memory caps the run, if any."""
        return find_card(self.card) if self.card else None

    def configurations(self, device: str, models: Iterable[str] = ()) -> list[Configuration]:
        """Every model, or these, in every configuration, on `device` (cuda or cpu).

        Raises BadInput for a configuration that does not exist.
        """
        texts = listed(self.configuration) or [
            f"{execution}/{self.protocol}/{self.kernel}" for execution in self.execution.split(",")
        ]
        return [
            _configuration(text, variant, self.dtype, device)
            for text in texts
            for variant in models or self.models
        ]

    def matrix(self) -> list[SweepOptions]:
        """One copy for each size x workload x execution, without the options of other workloads."""
        own: dict[str, dict[str, Any]] = {
            "queries": {"pages": "", "loaders": (), "visual_tokens": VISUAL_TOKENS},
            "pages": {"texts": "report"},
        }
        return [
            self.model_copy(
                update={"size": size, "workload": workload, "execution": execution} | own[workload]
            )
            for size in self.size.split(",")
            for workload in self.workload.split(",")
            for execution in self.execution.split(",")
        ]


def _configuration(text: str, variant: str, dtype: str, device: str) -> Configuration:
    parts = {"report": REPORT[device], "best": BEST}.get(text, text).split("/")
    if len(parts) > 3:
        raise BadInput(
            f"configuration must be report, best or EXECUTION/PROTOCOL/KERNEL, got {text!r}"
        )
    execution, protocol, kernel = [*parts, *("eager", "lean", "auto")[len(parts) :]]
    one_of("execution", execution, EXECUTIONS)
    one_of("protocol", protocol, PROTOCOLS)
    if execution == "fast" and protocol != "lean":
        raise BadInput("execution fast keeps no KV cache; use protocol lean")
    if kernel in EIGHT_BIT_KERNELS and execution != "fast":
        raise BadInput(f"kernel {kernel} runs in execution fast only")
    return Configuration(
        variant=variant, execution=execution, protocol=protocol, kernel=kernel, dtype=dtype
    )


class PlanOptions(Options):
    """Options of `plan`."""

    model: Several = "base,awq"
    """base, awq, a scheme such as W8A16, a folder, or several"""
    batch_sizes: BatchSizes = "8,16,32,64,128,256,512"  # type: ignore[assignment]
    """such as 8,512"""
    size: Size = "auto"
    """auto (a folder's own, else 4b), tiny, mid, 4b, 8b"""
    cards: Cards = "8,12,16,24"
    """memory in GB or GPUs by name: 8,RTX 4070"""
    protocol: Protocol = "lean"
    """lean or published"""
    kernel: str = Field(
        "tritonv2",
        description="kernel of packed weights: tritonv2, torch, humming, fused (such as marlin); "
        "fast: also int4, fp8",
    )
    dtype: Dtype = "bfloat16"
    workload: Annotated[str, _choice(*WORKLOADS)] = "queries"
    """queries or pages"""
    visual_tokens: VisualTokens = VISUAL_TOKENS
    """pages: the budget of an image"""
    tokens: Annotated[int, Field(ge=0)] = 0
    """tokens of every item; 0 is the report's queries, or A4 pages"""
    execution: Annotated[str, _choice(*EXECUTIONS)] = "eager"
    """eager or fast"""


class CompareOptions(Options):
    """Options of `compare`. `base` and `awq` are Results, records files, or `published`."""

    base: Any = "published"
    """a records file that holds BASE, or the word published"""
    awq: Any = ""
    """a records file of the quantised model; default: the first file"""
    cards: Cards = "8,12,16,24"
    """memory budgets in GB, or GPUs by name"""


class QuantizeOptions(Options):
    """Options of `quantize`."""

    scheme: str = "W4A16"
    """an AutoRound scheme: W4A16 (group 128), W8A16, W2A16G32 ..."""
    size: Size = "auto"
    weights: Weights = "auto"
    """the 16-bit weights: auto, hub, random, or a checkpoint folder"""
    iters: int = 50
    """tuning steps a layer; 0 is plain rounding"""
    samples: int = 64
    """calibration samples"""
    seqlen: int = 64
    """tokens a sample"""
    format: Annotated[str, _choice(*FORMATS)] = "auto_round"
    """the packing: auto_round, auto_gptq, auto_awq"""
    texts: PathText = ""
    """a file of calibration texts, one a line; by default built in"""
    output: PathText = ""
    """a new folder; by default outputs/SIZE-SCHEME"""


class FidelityOptions(Options):
    """Options of `fidelity`."""

    model: Several = "awq"
    """awq, a scheme such as W8A16, a folder, a hub id, or several"""
    data: Annotated[PathText, AfterValidator(_data)] = "generated"
    """generated (synthetic pages), vidore:NAME, or a folder in BEIR layout"""
    size: Size = "auto"
    weights: Weights = "auto"
    """BASE's weights: auto, hub, or a checkpoint folder"""
    iters: int = 50
    """tuning steps a layer of schemes quantised here; 0: rounding alone"""
    plain: bool = False
    """also measure each scheme rounded without tuning"""
    formats: Several = ""
    """index formats to add: int8, binary, hamming, float16, poolN, dimsN, or joined by -"""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """the smallest difference that counts, in each metric's unit"""
    queries: Annotated[int, Field(ge=0)] = 0
    """how many at most; 0 means all"""
    pages: Annotated[int, Field(ge=0)] = 0
    """how many at most; 0 means all"""
    visual_tokens: VisualTokens = VISUAL_TOKENS
    """the budget of a page"""
    output: RecordsPath = ""


class SearchOptions(Options):
    """Options of `search_times`."""

    formats: Several = "bfloat16,int8,binary"
    """index formats: bfloat16, float16, int8, binary, hamming, poolN, dimsN, or joined by -"""
    pages: BatchSizes = "auto"  # type: ignore[assignment]
    """such as 1000,10000; auto is 1000 to 50000 on a GPU, 30 to 300 else"""
    queries: BatchSizes = "1,64"  # type: ignore[assignment]
    """queries at once, such as 1,64"""
    vectors: Annotated[int, Field(ge=0)] = 0
    """vectors a page; 0 is 1260 on a GPU, as an A4 page has, and 88 else"""
    dims: Annotated[int, Field(ge=1, le=4096)] = 320
    """values a vector"""
    query_tokens: Annotated[int, Field(ge=1, le=4096)] = 20
    """vectors a query"""
    kernel: Several = "auto"
    """auto, triton (a CUDA GPU) or torch; both are interleaved: triton,torch"""
    max_s: Annotated[float, Field(gt=0)] = 1.0
    """seconds to time a search"""
    output: PathText = ""
    """the records file, .jsonl; by default search-times.jsonl under outputs/"""
