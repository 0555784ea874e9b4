"""The default weights of `tiny`: a ColQwen3 trained from scratch to find drawn pages by queries in words.

Each step embeds a batch of queries and the pages of the same numbers, scores all against all by MaxSim, and lowers
the cross entropy of the right ones (InfoNCE, Oord et al. 2018; only over pages, as a score's size hangs on the
query's length), and with it the error of naming the facts. The first steps see small pages, which cost a third; the
others see them as `synthetic.SMALL_WIDTH` has it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from colqwen_lab.errors import BadInput
from colqwen_lab.model import synthetic
from colqwen_lab.model.checkpoint import FolderCheckpoint
from colqwen_lab.model.inputs import TINY_TOKENIZER, VISUAL_TOKENS, page_batch, read_tokenizer
from colqwen_lab.model.loading import Loaded, load
from colqwen_lab.model.network import ColQwen3, ColQwen3Config
from colqwen_lab.model.quantize import RECORD
from colqwen_lab.retrieval import data, metrics
from colqwen_lab.retrieval.embed import blocks, embed, embed_pages, query_inputs
from colqwen_lab.retrieval.maxsim import maxsim, unpadded
from colqwen_lab.settings import in_use, writable_folder

# (pixels that a page is wide, steps, how many pages in a row of a batch agree in kind and colour). Where they do, only
# the topic and the place tell them apart: else a net that cannot read is right too often to learn it. But a net that
# starts so learns nothing.
Stage = tuple[int, int, int]
STAGES: tuple[Stage, ...] = ((128, 120, 1), (synthetic.SMALL_WIDTH, 200, 4))
BATCH, RATE, TEMPERATURE = 32, 1.5e-3, 0.7
# How many pages are drawn for each of the split's facts; afterwards they come back.
TURNS = 3
# The deviation that weights are drawn with. The published 0.02 suits a width of 2,560; here a net stays as it is born,
# every token the same.
DEVIATION = 0.08
FACTS = (*synthetic.TOPICS, *synthetic.KINDS, *synthetic.COLOURS, *synthetic.PLACES)
CPU = torch.device("cpu")


def contrastive_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """The mean over queries of -log(probability of the right pages among all).

    Args:
        scores: [queries, pages].
        answers: [queries, pages], true where the page answers the query; at least one in each row.
    """
    return (scores.logsumexp(1) - scores.masked_fill(~answers, -torch.inf).logsumexp(1)).mean()


def naming_loss(
    names: torch.nn.Linear, embeddings: Sequence[Tensor], facts: Sequence[Sequence[str]]
) -> Tensor:
    """How badly `names` tells from the mean of each row's embeddings [tokens, 320] which of FACTS hold.

    MaxSim alone teaches only the tokens that win; this reaches all, and with one `names` for queries and pages brings
    the two together.
    """
    means = torch.stack([row.mean(0) for row in embeddings])
    truth = torch.tensor([[float(fact in has) for fact in FACTS] for has in facts])
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        names(means) * 10, truth, reduction="none"
    )
    return each.sum(1).mean()


def fresh(seed: int) -> Loaded:
    """A tiny network in float32 with seeded weights, ready to be trained."""
    torch.manual_seed(seed)
    config = ColQwen3Config.of_size("tiny")
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = DEVIATION
    tokenizer = read_tokenizer(TINY_TOKENIZER)
    return Loaded(
        ColQwen3(config).train(), tokenizer, f"untrained (seed {seed})", CPU, "auto", {}, {}
    )


def fit(
    loaded: Loaded,
    seed: int,
    stages: Sequence[Stage] = STAGES,
    progress: Callable[[str], None] = print,
) -> list[float]:
    """Train in place; the loss of each step."""
    model, random = loaded.model, Random(seed)
    total = sum(steps for _, steps, _ in stages)
    names = torch.nn.Linear(model.config.embed_dim, len(FACTS))
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *names.parameters()], RATE, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total, pct_start=0.1)
    losses: list[float] = []
    for width, steps, alike in stages:
        page = cache(lambda number, width=width: synthetic.page(number, "train", width))
        for _ in range(steps):
            batch = _batch(random, alike)
            pages = [page(number) for number in batch]
            queries = _embedded(
                model, query_inputs(loaded, [synthetic.query(number) for number in batch])
            )
            shown = _embedded(
                model, page_batch(pages, loaded.tokenizer, model.config, _visual_tokens(width))
            )
            described, asked = (
                [synthetic.facts(number) for number in batch],
                [synthetic.asked(number) for number in batch],
            )
            answers = torch.tensor(
                [[has[: len(wanted)] == wanted for has in described] for wanted in asked]
            )
            loss = contrastive_loss(maxsim(queries, shown) / TEMPERATURE, answers)
            optimizer.zero_grad()
            (
                loss + naming_loss(names, queries, asked) + naming_loss(names, shown, described)
            ).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 25 == 0 or len(losses) == total:
                progress(
                    f"step {len(losses)} of {total}: loss {sum(losses[-25:]) / len(losses[-25:]):.3f}"
                )
    return losses


@cache
def _alike() -> list[list[int]]:
    """The numbers of training pages, one for all of their facts, in lists that agree in kind and colour."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number in range(synthetic.different("train")):
        has = synthetic.facts(number)
        groups.setdefault((has.kind, has.colour), []).append(number)
    return list(groups.values())


def _batch(random: Random, alike: int) -> list[int]:
    groups = random.choices(_alike(), k=BATCH // alike)
    facts = [number for group in groups for number in random.sample(group, alike)]
    return [number + synthetic.different("train") * random.randrange(TURNS) for number in facts]


def _embedded(model: ColQwen3, inputs: dict[str, Tensor]) -> list[Tensor]:
    embeddings = model(**inputs).embeddings
    assert embeddings is not None
    return unpadded(embeddings, inputs["attention_mask"])


def _visual_tokens(width: int) -> int:
    """The budget that keeps a page of this width as it is, where the published processor would enlarge it."""
    return (width // 32) * round(width * synthetic.HEIGHT / synthetic.WIDTH / 32)


def held_out(loaded: Loaded) -> tuple[float, float]:
    """`(nDCG@5, shuffled control)` on all held-out pages and queries.

    The control judges each query's ranking by the answers to another: what a model gets that finds nothing.
    """
    corpus = data.load(data.GENERATED, width=synthetic.SMALL_WIDTH)
    queries, _ = embed(loaded, query_inputs(loaded, corpus.queries))
    pages: list[Tensor] = []
    for part in blocks(len(corpus.page_ids), BATCH):
        pages += embed_pages(loaded, [corpus.page(number) for number in part], VISUAL_TOKENS)[0]
    ranked = metrics.ranking(maxsim(queries, pages).numpy())
    ids, half = corpus.query_ids, len(corpus.query_ids) // 2
    others = dict(
        zip(ids, (corpus.relevance[query] for query in ids[half:] + ids[:half]), strict=True)
    )
    found = [
        metrics.retrieval(ranked, ids, corpus.page_ids, judged)["nDCG@5"]
        for judged in (corpus.relevance, others)
    ]
    own, control = (sum(values) / len(values) for values in found)
    return own, control


def train_tiny(
    folder: Path,
    seed: int = 0,
    stages: Sequence[Stage] = STAGES,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the tiny model into a checkpoint folder (BF16), evaluate what was saved, and write the record beside it.

    Raises:
        BadInput: the folder is not empty, or cannot be written; or no such seed.
    """
    if not 0 <= seed < 2**64:
        raise BadInput(f"seed {seed}; valid: 0 to {2**64 - 1}")
    if in_use(folder):
        raise BadInput(f"{folder} is not empty; name a new folder")
    writable_folder(folder)
    started, cpu_started = time.perf_counter(), time.process_time()
    loaded = fresh(seed)
    losses = fit(loaded, seed, stages, progress)
    spent = {"elapsed_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_started}
    values = {
        name: tensor.bfloat16().contiguous() for name, tensor in loaded.model.state_dict().items()
    }
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        ColQwen3Config.of_size("tiny").to_json_string(), encoding="utf-8"
    )
    (folder / "tokenizer.json").write_bytes(TINY_TOKENIZER.read_bytes())
    source = FolderCheckpoint(folder)
    own, control = held_out(load(source, CPU))
    record = {
        "seed": seed,
        "stages": [list(stage) for stage in stages],
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        **{name: round(seconds, 1) for name, seconds in spent.items()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "loss": {
            "first": round(losses[0], 4),
            "last 25": round(sum(losses[-25:]) / len(losses[-25:]), 4),
        },
        "ndcg_at_5": round(own, 4),
        "shuffled_control": round(control, 4),
        "digest": source.digest,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
