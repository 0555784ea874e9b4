"""Trains the default weights of `tiny` from scratch: queries in words must find synthetic pages.

A step embeds a batch of queries and their pages, and scores all pairs by MaxSim. The loss is
InfoNCE over the pages (Oord et al. 2018), plus the loss of naming facts from the mean embedding.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from colqwen_lab.errors import BadInput
from colqwen_lab.model import synthetic
from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.model.inputs import TINY_TOKENIZER, page_batch, read_tokenizer
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.model.network import ColQwen3, ColQwen3Config
from colqwen_lab.model.quantize import RECORD
from colqwen_lab.options import VISUAL_TOKENS
from colqwen_lab.retrieval import data, metrics
from colqwen_lab.retrieval.evaluate import query_inputs, records_of
from colqwen_lab.settings import in_use, writable_folder

# Page width in pixels, steps, and how many pages in a row of a batch agree in kind and colour.
# Those differ in topic and place only, so that the network must learn to read; from the start it
# learns nothing so. Small pages cost a third.
Stages = Sequence[tuple[int, int, int]]
STAGES: Stages = ((128, 120, 1), (synthetic.SMALL_WIDTH, 200, 4))
BATCH, LEARNING_RATE, TEMPERATURE = 32, 1.5e-3, 0.7
REPEATS = 3  # different pages for each combination of facts
# The published 0.02 is too small at width 128: token embeddings stay identical.
INITIALIZER_RANGE = 0.08
FACTS = (*synthetic.TOPICS, *synthetic.KINDS, *synthetic.COLOURS, *synthetic.PLACES)
CPU = torch.device("cpu")


def contrastive_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """The mean over queries of -log(probability of the relevant pages among all pages).

    Both are [queries, pages]; `answers` is true where the page answers the query.
    """
    return (scores.logsumexp(1) - scores.masked_fill(~answers, -torch.inf).logsumexp(1)).mean()


def naming_loss(
    naming: nn.Linear, embeddings: Sequence[Tensor], facts: Sequence[Sequence[str]]
) -> Tensor:
    """The cross entropy of predicting each row's facts from its mean embedding with `naming`.

    MaxSim alone trains only the best tokens. One `naming` brings queries and pages together.
    """
    logits = naming(torch.stack([row.mean(0) for row in embeddings])) * 10
    truth = torch.tensor([[float(fact in row) for fact in FACTS] for row in facts])
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return entropy.sum(1).mean()


def fresh(seed: int) -> Loaded:
    """A tiny network in float32 with seeded weights, in training mode."""
    torch.manual_seed(seed)
    config = ColQwen3Config.of_size("tiny")
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = INITIALIZER_RANGE
    model, tokenizer = ColQwen3(config).train(), read_tokenizer(TINY_TOKENIZER)
    return Loaded(model, tokenizer, f"untrained (seed {seed})", CPU, "auto", {}, {})


def fit(loaded: Loaded, seed: int, stages: Stages, progress: Callable[[str], None]) -> list[float]:
    """Train `loaded` in place. Returns the loss of each step."""
    model, random = loaded.model, Random(seed)
    naming = nn.Linear(model.config.embed_dim, len(FACTS))
    parameters = [*model.parameters(), *naming.parameters()]
    total = sum(steps for _, steps, _ in stages)
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total, pct_start=0.1)
    losses: list[float] = []

    def embedded(inputs: dict[str, Tensor]) -> list[Tensor]:
        return metrics.unpadded(model(**inputs).embeddings, inputs["attention_mask"])

    for width, steps, alike in stages:
        page = cache(partial(synthetic.page, width=width))
        # The published processor enlarges small pages; this budget keeps their size.
        budget = (width // 32) * round(width * synthetic.HEIGHT / synthetic.WIDTH / 32)
        for _ in range(steps):
            numbers = _batch(random, alike)
            queries = embedded(query_inputs(loaded, list(map(synthetic.query, numbers))))
            images = map(page, numbers)
            pages = embedded(page_batch(images, loaded.tokenizer, model.config, budget))
            wanted = list(map(synthetic.query_facts, numbers))
            shown = list(map(synthetic.facts, numbers))
            answers = torch.tensor([[row[: len(q)] == q for row in shown] for q in wanted])
            loss = contrastive_loss(metrics.maxsim(queries, pages) / TEMPERATURE, answers)
            names = naming_loss(naming, queries, wanted) + naming_loss(naming, pages, shown)
            optimizer.zero_grad()
            (loss + names).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 25 == 0 or len(losses) == total:
                progress(f"step {len(losses)} of {total}: loss {fmean(losses[-25:]):.3f}")
    return losses


def _batch(random: Random, alike: int) -> list[int]:
    """Numbers of training pages, in groups of `alike` that agree in kind and colour."""
    groups, count = defaultdict(list), synthetic.different("train")
    for number in range(count):
        groups[synthetic.facts(number)[1:3]].append(number)
    chosen = random.choices(list(groups.values()), k=BATCH // alike)
    numbers = [number for group in chosen for number in random.sample(group, alike)]
    return [number + count * random.randrange(REPEATS) for number in numbers]


def held_out(loaded: Loaded) -> tuple[float, float]:
    """The mean nDCG@5 on all held-out pages and queries, and that of a shuffled control.

    The control judges another query's ranking by each query's answers: what chance reaches.
    """
    corpus = data.load(data.GENERATED, width=synthetic.SMALL_WIDTH)
    (record, *_), _ = records_of(loaded, corpus, VISUAL_TOKENS, None, variant="base", size="tiny")
    top, half = record.top, len(record.top) // 2
    control = metrics.retrieval(corpus.query_ids, top[half:] + top[:half], corpus.relevance)
    return fmean(record.values["nDCG@5"]), fmean(control["nDCG@5"])


def train_tiny(
    folder: Path,
    seed: int = 0,
    stages: Stages = STAGES,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train `tiny` into a BF16 checkpoint folder. Returns its record, which the folder also holds.

    Raises BadInput for a seed out of range, or a folder that is not empty or not writable.
    """
    if not 0 <= seed < 2**64:
        raise BadInput(f"seed must be 0 to {2**64 - 1}, got {seed}")
    if in_use(folder):
        raise BadInput(f"{folder} is not empty; name a new folder")
    writable_folder(folder)
    started_s = time.perf_counter()
    loaded = fresh(seed)
    losses = fit(loaded, seed, stages, progress)
    elapsed_s = time.perf_counter() - started_s
    tensors = {name: value.bfloat16() for name, value in loaded.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = ColQwen3Config.of_size("tiny").to_json_string()
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(TINY_TOKENIZER.read_bytes())
    checkpoint = FolderCheckpoint(folder)
    ndcg, control = held_out(load(checkpoint, CPU))
    record = {
        "seed": seed,
        "stages": stages,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "elapsed_s": round(elapsed_s, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "loss": {"first": round(losses[0], 4), "last 25": round(fmean(losses[-25:]), 4)},
        "ndcg_at_5": round(ndcg, 4),
        "shuffled_control": round(control, 4),
        "digest": checkpoint.digest,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
