"""Embeds the same queries and pages with BASE and with each variant, and compares the results.

Only BASE's page embeddings are kept; a variant's are compared and scored batch by batch.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.measure.environment import environment, pick_device
from colqwen_lab.measure.timing import synchronise
from colqwen_lab.model.config import SIZE_VARIABLE, VARIANTS, Variant, resolve_size, resolve_variant
from colqwen_lab.model.inputs import encode_queries, left_padded, pad_id, page_batch
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.model.network import ColQwen3Config
from colqwen_lab.model.quantize import Recipe, checkpoint_of
from colqwen_lab.model.synthetic import SMALL_WIDTH, WIDTH
from colqwen_lab.options import VISUAL_TOKENS, FidelityOptions, listed
from colqwen_lab.records import Backend, RecordsFile
from colqwen_lab.retrieval import data, metrics
from colqwen_lab.retrieval.data import Corpus, Page
from colqwen_lab.retrieval.index import Format, Index
from colqwen_lab.retrieval.record import Cosines, Fidelity
from colqwen_lab.settings import outputs_folder

MAX_ITERS = 1000
# A longer text loses its end; characters beyond these are not tokenised.
TEXT_TOKENS, TEXT_CHARACTERS = 2048, 2**16
QUERY_BATCH, PAGE_BATCH = 32, 8
TOP_PAGES, DIGITS = 10, 6  # of a query and of a value, in a record
QUANTILES = {"least": 0, "q01": 0.01, "q05": 0.05, "q25": 0.25, "median": 0.5}


class Embedded(NamedTuple):
    """BASE's embeddings [tokens, 320] of each query and page, and its scores [queries, pages]."""

    queries: list[Tensor]
    pages: list[Tensor]
    scores: np.ndarray


def evaluate(
    options: FidelityOptions, progress: Callable[[str], None]
) -> tuple[list[Fidelity], Corpus]:
    """The records of BASE and of each variant, in this order, and the corpus they ran on.

    Each record is appended to the records file as soon as it is complete. Raises BadInput for
    options that do not fit, MissingRequirement without weights, kernel or tokenizer.
    """
    device = pick_device()
    formats = [Format.parse(name) for name in listed(options.formats)]
    size = resolve_size(options.size, device.type == "cuda")
    chosen = subjects(options, size)
    width = SMALL_WIDTH if size == "tiny" else WIDTH
    corpus = data.load(options.data, options.queries, options.pages, width, progress)
    budget = options.visual_tokens
    if budget != VISUAL_TOKENS and all(isinstance(corpus.page(i), str) for i in corpus.page_ids):
        raise BadInput(
            f"visual_tokens must be {VISUAL_TOKENS} where no page is an image, got {budget} for "
            f"{corpus.label}"
        )
    names = "-".join(dict.fromkeys(variant.name for variant, _ in chosen[1:]))
    stem = re.sub("[/:]", "-", f"fidelity-{names}-{size}-{options.data}")
    path = Path(options.output or outputs_folder() / f"{stem}.jsonl")
    records: list[Fidelity] = []
    base: Embedded | None = None
    network: ColQwen3Config | None = None  # of BASE
    with RecordsFile(path, Fidelity, "fidelity", progress) as file:
        for variant, recipe in chosen:
            weights = options.weights if variant.name == "base" else "auto"
            checkpoint = checkpoint_of(variant, size, weights, device, recipe)
            network = network or checkpoint.config
            checkpoint.check_network(network)
            if checkpoint.size != size:
                source = f" from {SIZE_VARIABLE}" * (
                    options.size == "auto" and SIZE_VARIABLE in os.environ
                )
                raise MissingRequirement(
                    f"size must be {checkpoint.size} for {checkpoint.label}, got {size}{source}"
                )
            about = {"variant": variant.name, "size": size, "iters": recipe and recipe.iters}
            model = load(checkpoint, device)
            (record, *others), base = records_of(model, corpus, budget, base, formats, **about)
            del model
            file.append([record, *others])
            records += [record, *others]
            ndcg = f"nDCG@5 {np.mean(record.values['nDCG@5']):.4f}"
            progress(f"{record.label} {size}: {ndcg} on {corpus.label}, {record.weights}")
            if record.cut:
                progress(f"{record.label} {size}: texts cut to {TEXT_TOKENS} tokens: {record.cut}")
            gc.collect()  # frees this model before the next is loaded
    return records, corpus


def subjects(options: FidelityOptions, size: str) -> list[tuple[Variant, Recipe | None]]:
    """BASE and the variants, each with its recipe if it is quantised for this run.

    With `plain` each of these comes also without tuning. Raises BadInput for models that are
    unknown, repeated or only BASE, and for weights or steps that do not fit.
    """
    variants = {variant.name: variant for variant in map(resolve_variant, options.models)}
    if len(variants) < len(options.models) or set(variants) <= {"base"}:
        raise BadInput(
            "model must be different ones of awq, an AutoRound scheme, a folder or a hub id, to "
            f"compare with base; got {options.model}"
        )
    if not 0 <= options.iters <= MAX_ITERS:
        raise BadInput(f"iters must be 0 (plain rounding) to {MAX_ITERS}, got {options.iters}")
    if options.weights == "random":
        raise BadInput("weights must be auto, hub or a folder, got random, which ranks at random")
    steps = dict.fromkeys([options.iters, 0] if options.plain else [options.iters])
    chosen: list[tuple[Variant, Recipe | None]] = []
    for variant in ({"base": VARIANTS["base"]} | variants).values():
        if not variant.scheme or size in variant.hub:
            chosen.append((variant, None))
        elif options.weights in ("auto", "hub"):
            chosen += [(variant, Recipe(variant.scheme, iters)) for iters in steps]
        else:
            raise BadInput(
                f"weights must be auto or hub to quantise {variant.name} from, got "
                f"{options.weights}; run `colqwen-lab quantize --weights {options.weights} "
                f"--scheme {variant.scheme} -o DIR` and name DIR as the model"
            )
    return chosen


def records_of(
    loaded: Loaded,
    corpus: Corpus,
    visual_tokens: int,
    base: Embedded | None,
    formats: Sequence[Format] = (),
    **about: Any,
) -> tuple[list[Fidelity], Embedded]:
    """A model's records, and the embeddings of BASE: `base`, or the model's own if that is None.

    The first record is of pages as the model gives them, the others of each format, from the same
    embeddings. `about` holds the record's variant, size and tuning steps.
    """
    queries: list[Tensor] = []
    for start in range(0, len(corpus.queries), QUERY_BATCH):
        texts = corpus.queries[start : start + QUERY_BATCH]
        queries += embed(loaded, texts, visual_tokens)[0]
    if base and list(map(len, queries)) != list(map(len, base.queries)):
        raise BadInput(
            f"{loaded.weights} splits the queries otherwise than base: its tokenizer differs; use "
            "the tokenizer.json of the model it was quantised from"
        )
    on_device = [query.to(loaded.device) for query in queries]
    pages: list[Tensor] = []
    cosines: list[Tensor] = []
    blocks: dict[str, list[Tensor]] = {"": [], **{form.name: [] for form in formats}}
    page_bytes = dict.fromkeys(blocks, 0.0)
    ready = {form.name: form.queries(on_device) for form in formats}
    steps, cut = [], _cut(loaded, corpus.queries)
    for start in range(0, len(corpus.page_ids), PAGE_BATCH):
        ids = corpus.page_ids[start : start + PAGE_BATCH]
        batch = list(map(corpus.page, ids))
        embedded, seconds = embed(loaded, batch, visual_tokens)
        cut += _cut(loaded, batch)
        blocks[""].append(metrics.maxsim(on_device, embedded).cpu())
        for name, form in [("", Format()), *((form.name, form) for form in formats)]:
            index = Index.build(form, embedded, ids)
            page_bytes[name] += index.page_bytes * len(ids) / len(corpus.page_ids)
            if name:
                blocks[name].append(index.to(loaded.device).scores(ready[name]).cpu())
        cosines += map(_cosine, embedded, base.pages[start:] if base else embedded)
        pages += [] if base else embedded
        steps += [seconds] if len(batch) == PAGE_BATCH else []
    scores = {name: torch.cat(parts, dim=1).numpy() for name, parts in blocks.items()}
    base = base or Embedded(queries, pages, scores[""])
    query_cosines = list(map(_cosine, queries, base.queries))
    about |= {
        "weights": loaded.weights,
        "data": corpus.label,
        "pages": len(corpus.page_ids),
        "skipped": corpus.skipped,
        "cut": cut,
        "visual_tokens": visual_tokens,
        "backend": Backend(
            requested=loaded.requested_kernel,
            engaged=loaded.engaged,
            dtype=loaded.dtype,
            kept_16bit=loaded.kept_16bit,
        ),
        "weights_bytes": loaded.weights_bytes,
        "query_cosine": _summary(query_cosines),
        "page_cosine": _summary(cosines),
        "page_batch": PAGE_BATCH,
        "page_step_s": steps[1:],
        "query_ids": corpus.query_ids,
        "query_groups": groups_of(corpus),
        "environment": environment(loaded.device),
    }
    cosine = [float(each.mean()) for each in query_cosines]
    records = [
        Fidelity(
            index_format=name,
            page_bytes=round(page_bytes[name], 1),
            **_ranked(corpus, own, base.scores, cosine),
            **about,
        )
        for name, own in scores.items()
    ]
    return records, base


def groups_of(corpus: Corpus) -> list[int]:
    """A number for each query; queries with the same relevant pages share it."""
    judged = [corpus.relevance[query].items() for query in corpus.query_ids]
    answers = [frozenset(page for page, score in scores if score > 0) for scores in judged]
    numbers = {pages: number for number, pages in enumerate(dict.fromkeys(answers))}
    return [numbers[pages] for pages in answers]


def _ranked(
    corpus: Corpus, scores: np.ndarray, base: np.ndarray, cosine: list[float]
) -> dict[str, Any]:
    """`values` and `top` of a record, from scores [queries, pages] and BASE's."""
    ranked, base_ranked = metrics.ranking(scores), metrics.ranking(base)
    top = [[corpus.page_ids[page] for page in row[:TOP_PAGES]] for row in ranked]
    values = metrics.retrieval(corpus.query_ids, top, corpus.relevance) | {
        **{f"overlap@{k}": metrics.overlap(ranked, base_ranked, k) for k in (5, 10)},
        "Kendall's tau": metrics.kendall(scores, base),
        "score error": metrics.score_error(scores, base),
        "query cosine": cosine,
    }
    rounded = {name: [round(value, DIGITS) for value in row] for name, row in values.items()}
    return {"values": rounded, "top": top}


def _cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """The cosine of each token [tokens]; in float64, as 16-bit embeddings are not unit vectors."""
    return cosine_similarity(ours.double(), theirs.double(), dim=-1).clamp(-1, 1)


def _summary(cosines: list[Tensor]) -> Cosines:
    values = torch.cat(cosines).numpy()
    quantiles = {name: float(np.quantile(values, at)) for name, at in QUANTILES.items()}
    return Cosines(tokens=len(values), mean=float(values.mean()), **quantiles)


def query_inputs(loaded: Loaded, texts: Sequence[str]) -> dict[str, Tensor]:
    """The inputs of a forward over queries; raises MissingRequirement without a tokenizer."""
    if loaded.tokenizer is None:
        raise MissingRequirement(f"{loaded.weights} has no tokenizer; name weights that have one")
    rows = encode_queries(loaded.tokenizer, _beginnings(texts), TEXT_TOKENS)
    ids, mask = left_padded(rows, pad_id(loaded.tokenizer))
    return {"input_ids": ids.to(loaded.device), "attention_mask": mask.to(loaded.device)}


def _beginnings(texts: Iterable[str]) -> list[str]:
    return [text[:TEXT_CHARACTERS] for text in texts]


def _cut(loaded: Loaded, items: Iterable[Page]) -> int:
    """The number of texts that are cut."""
    texts = [item for item in items if isinstance(item, str)]
    rows = encode_queries(loaded.tokenizer, _beginnings(texts)) if loaded.tokenizer else []
    lengths = zip(map(len, rows), map(len, texts), strict=False)
    return sum(row > TEXT_TOKENS or text > TEXT_CHARACTERS for row, text in lengths)


@torch.no_grad()
def embed(loaded: Loaded, items: Sequence[Page], visual_tokens: int) -> tuple[list[Tensor], float]:
    """The embeddings [tokens, 320] of each text or image, on the CPU, and the seconds of forwards.

    Images share one forward, texts another.
    """
    embeddings: dict[int, Tensor] = {}
    elapsed_s = 0.0
    for kind in (Image.Image, str):
        batch: dict[int, Any] = {n: item for n, item in enumerate(items) if isinstance(item, kind)}
        if not batch:
            continue
        if kind is str:
            inputs = query_inputs(loaded, [*batch.values()])
        else:
            config, device = loaded.model.config, loaded.device
            inputs = page_batch(batch.values(), loaded.tokenizer, config, visual_tokens, device)
        synchronise(loaded.device)
        started_s = time.perf_counter()
        padded = loaded.model(**inputs).embeddings
        synchronise(loaded.device)
        elapsed_s += time.perf_counter() - started_s
        if not padded.isfinite().all():
            raise MissingRequirement(f"{loaded.weights} gives embeddings that are not finite")
        rows = metrics.unpadded(padded, inputs["attention_mask"])
        embeddings |= {number: row.cpu() for number, row in zip(batch, rows, strict=True)}
    return [embeddings[number] for number in sorted(embeddings)], elapsed_s
