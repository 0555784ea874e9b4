"""Pages of both kinds in one batch."""

from __future__ import annotations

import torch

from colqwen_lab.model import synthetic
from colqwen_lab.model.loading import Loaded
from colqwen_lab.retrieval.embed import embed_pages


def test_texts_and_images_of_a_batch_keep_their_order(tiny: Loaded) -> None:
    pages = [
        "wheat prices rose",
        synthetic.page(0, width=128),
        "glaciers melt",
        synthetic.page(1, width=128),
    ]
    made, elapsed = embed_pages(tiny, pages, 64)
    assert elapsed > 0
    alone = [embed_pages(tiny, [page], 64)[0][0] for page in pages]
    assert len(made) == 4
    for ours, theirs in zip(made, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)
