"""BASE, then each variant, over the same queries and pages in the same batches: a record each.

Of the page embeddings only BASE's are kept; a variant's are compared and scored batch by batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.measure.environment import environment
from colqwen_lab.model.checkpoint import Checkpoint, default_checkpoint
from colqwen_lab.model.config import VARIANTS, Variant, resolve_variant
from colqwen_lab.model.inputs import VISUAL_TOKENS, check_visual_tokens
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.model.quantize import Recipe, checkpoint_of
from colqwen_lab.records import Backend, RecordsFile
from colqwen_lab.retrieval import metrics
from colqwen_lab.retrieval.data import Corpus
from colqwen_lab.retrieval.embed import blocks, embed, embed_pages, query_inputs
from colqwen_lab.retrieval.maxsim import maxsim
from colqwen_lab.retrieval.record import Cosines, Fidelity

MOST_ITERS = 1000
QUERY_BATCH, PAGE_BATCH, TOP = 32, 8, 10
DIGITS = 6  # after the point, of what a record keeps by query


@dataclass(frozen=True)
class Subject:
    """What is held against BASE: a variant, and the tuning steps where it is quantised here."""

    variant: Variant
    iters: int | None = None

    def __str__(self) -> str:
        return f"{self.variant.name} plain" if self.iters == 0 else self.variant.name


def subjects(models: Sequence[str], size: str, iters: int, plain: bool) -> list[Subject]:
    """BASE and the others; with `plain` each scheme that is quantised here also without tuning.

    Raises:
        BadInput: an unknown model, none beside BASE, or two of one name; or tuning steps out of bounds.
    """
    if not 0 <= iters <= MOST_ITERS:
        raise BadInput(f"iters {iters}; valid: 0 for plain rounding, to {MOST_ITERS}")
    found, variants = [Subject(VARIANTS["base"])], [resolve_variant(name) for name in models]
    names = [variant.name for variant in variants]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise BadInput(f"two models are called {twice}; valid: different ones")
    if names == ["base"]:
        raise BadInput(
            "base is what models are held against; valid: awq, an AutoRound scheme, a folder or a hub id"
        )
    for variant in variants:
        if variant.name == "base":
            continue
        if variant.scheme and size not in variant.hub:
            found += [
                Subject(variant, steps) for steps in ([iters, 0] if plain and iters else [iters])
            ]
        else:
            found.append(Subject(variant))
    return found


def _source(subject: Subject, size: str, weights: str, device: torch.device) -> Checkpoint:
    if subject.iters is None:
        return default_checkpoint(
            subject.variant, size, weights if subject.variant.name == "base" else "auto", device
        )
    return checkpoint_of(
        subject.variant, size, "auto", device, Recipe(subject.variant.scheme or "", subject.iters)
    )


@dataclass(frozen=True)
class _Embedded:
    """BASE's side: its embeddings, and scores [queries, pages]."""

    queries: list[Tensor]
    pages: list[Tensor]
    scores: np.ndarray


def run(
    asked: Sequence[Subject],
    corpus: Corpus,
    size: str,
    weights: str,
    visual_tokens: int,
    device: torch.device,
    path: Path,
    progress: Callable[[str], None],
) -> list[Fidelity]:
    """A record for each of `asked`, BASE first; the file holds what there is after each, and what it held is set aside.

    Raises:
        BadInput: random weights, weights that a scheme cannot be made from, a budget of images where there is none, or
            a file that is of something else.
        MissingRequirement: no weights, no kernel, no tokenizer.
    """
    if weights == "random":
        raise BadInput(
            "random weights say nothing of retrieval; valid: auto, hub, or a checkpoint folder"
        )
    made_here = [subject for subject in asked if subject.iters is not None]
    if made_here and weights not in ("auto", "hub"):
        raise BadInput(
            f"{made_here[0]} is quantised from the default weights, not from {weights}; make one with `colqwen-lab "
            f"quantize --weights {weights} --scheme {made_here[0].variant.scheme} -o DIR` and name DIR as the model"
        )
    if check_visual_tokens(visual_tokens) != VISUAL_TOKENS and not any(
        isinstance(corpus.page(number), Image.Image) for number in range(len(corpus.page_ids))
    ):
        raise BadInput(
            f"visual_tokens {visual_tokens}, and no page of {corpus.label} is an image; leave it out"
        )
    records: list[Fidelity] = []
    base: _Embedded | None = None
    with RecordsFile(path, Fidelity, "fidelity", progress) as file:
        for subject in asked:
            source = _source(subject, size, weights, device)
            if source.size != size:
                raise MissingRequirement(
                    f"{source.label} is of size {source.size}, not {size}; name its size"
                )
            record, embedded = _one(
                subject, load(source, device), corpus, size, visual_tokens, base
            )
            base = base or embedded
            records.append(record)
            file.append([record])
            mean = np.mean(record.values["nDCG@5"])
            progress(
                f"{record.label} {size}: nDCG@5 {mean:.4f} on {corpus.label}, {record.weights}"
            )
            if device.type == "cuda":
                gc.collect()  # before the next model needs the memory
    return records


def _one(
    subject: Subject,
    loaded: Loaded,
    corpus: Corpus,
    size: str,
    visual_tokens: int,
    base: _Embedded | None,
) -> tuple[Fidelity, _Embedded]:
    count = len(corpus.page_ids)
    queries: list[Tensor] = []
    for part in blocks(len(corpus.queries), QUERY_BATCH):
        queries += embed(loaded, query_inputs(loaded, [corpus.queries[i] for i in part]))[0]
    scores = torch.empty(len(queries), count)
    pages: list[Tensor] = []
    cosines, steps = [], []
    for part in blocks(count, PAGE_BATCH):
        made, elapsed = embed_pages(loaded, [corpus.page(i) for i in part], visual_tokens)
        scores[:, part.start : part.stop] = maxsim(
            [q.to(loaded.device) for q in queries], made
        ).cpu()
        steps += [elapsed] if len(part) == PAGE_BATCH else []
        theirs = base.pages[part.start : part.stop] if base else made
        cosines += [_cosine(*pair) for pair in zip(made, theirs, strict=True)]
        pages += [] if base else made
    against = base or _Embedded(queries, pages, scores.numpy())
    of_queries = [_cosine(*pair) for pair in zip(queries, against.queries, strict=True)]
    record = Fidelity(
        variant=subject.variant.name,
        size=size,
        weights=loaded.weights,
        iters=subject.iters,
        data=corpus.label,
        pages=count,
        skipped=corpus.refused,
        visual_tokens=visual_tokens,
        backend=Backend(
            requested=loaded.requested_backend,
            engaged=loaded.engaged,
            dtype=loaded.dtype,
            kept_16bit=loaded.kept_16bit,
        ),
        weights_bytes=loaded.weights_bytes,
        query_cosine=_quantiles(of_queries),
        page_cosine=_quantiles(cosines),
        page_batch=PAGE_BATCH,
        page_step_s=steps[1:],
        query_ids=corpus.query_ids,
        environment=environment(loaded.device),
        **_values(scores.numpy(), against.scores, of_queries, corpus),
    )
    return record, against


def _values(
    scores: np.ndarray, base: np.ndarray, cosines: Sequence[Tensor], corpus: Corpus
) -> dict[str, Any]:
    ranked, before = metrics.ranking(scores), metrics.ranking(base)
    values = metrics.retrieval(ranked, corpus.query_ids, corpus.page_ids, corpus.relevance)
    values |= {f"overlap@{k}": metrics.overlap(ranked, before, k) for k in metrics.OVERLAP_AT}
    values |= {
        "Kendall's tau": metrics.kendall(scores, base),
        "score error": metrics.score_error(scores, base),
    }
    values |= {"query cosine": [float(one.mean()) for one in cosines]}
    top = [[corpus.page_ids[page] for page in row[:TOP]] for row in ranked]
    rounded = {
        metric: [round(value, DIGITS) for value in every] for metric, every in values.items()
    }
    return {"values": rounded, "top": top}


def _cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """The cosine of each token [tokens], in float64: embeddings in 16 bits are not quite of length 1."""
    return torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1).clamp(
        -1, 1
    )


def _quantiles(cosines: Sequence[Tensor]) -> Cosines:
    every = torch.cat(list(cosines)).numpy()
    q01, q05, q25, median = (float(value) for value in np.quantile(every, [0.01, 0.05, 0.25, 0.5]))
    least, mean = float(every.min()), float(every.mean())
    return Cosines(
        tokens=len(every), least=least, q01=q01, q05=q05, q25=q25, median=median, mean=mean
    )
