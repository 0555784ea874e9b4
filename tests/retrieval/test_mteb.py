"""A variant in mteb's own evaluation, on a small synthetic task; its scores are the lab's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colqwen_lab.model import synthetic
from colqwen_lab.retrieval import data
from colqwen_lab.retrieval.evaluate import embed
from colqwen_lab.retrieval.metrics import maxsim

mteb = pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def task() -> Any:
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    corpus = data.load("generated", queries=4, pages=6, width=synthetic.SMALL_WIDTH)

    class Synthetic(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="ColQwenLabSynthetic",
            description="Synthetic pages.",
            reference=None,
            dataset={"path": "synthetic", "revision": "1"},
            type="DocumentUnderstanding",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_5",
        )

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            images = [{"id": page_id, "image": corpus.page(page_id)} for page_id in corpus.page_ids]
            texts = [
                {"id": query, "text": text}
                for query, text in zip(corpus.query_ids, corpus.queries, strict=True)
            ]
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": datasets.Dataset.from_list(images).cast_column(
                            "image", datasets.Image()
                        ),
                        "queries": datasets.Dataset.from_list(texts),
                        "relevant_docs": corpus.relevance,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Synthetic(), corpus


def test_mteb_scores_with_the_lab_s_scores(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mteb.models.models_protocols import EncoderProtocol

    from colqwen_lab.retrieval.mteb import MtebModel

    model, (synthetic_task, corpus), seen = MtebModel("base", size="tiny"), task, []
    assert isinstance(model, EncoderProtocol)
    similarity = model.similarity
    monkeypatch.setattr(
        model, "similarity", lambda *both: seen.append(similarity(*both)) or seen[-1]
    )
    result = mteb.evaluate(model, synthetic_task, cache=None, show_progress_bar=False).task_results[
        0
    ]
    queries, _ = embed(model.loaded, corpus.queries, 1280)
    pages, _ = embed(model.loaded, list(map(corpus.page, corpus.page_ids)), 1280)
    (scores,) = seen
    torch.testing.assert_close(scores, maxsim(queries, pages))
    assert 0 <= result.scores["test"][0]["ndcg_at_5"] <= 1
    assert result.task_name == "ColQwenLabSynthetic"


def test_documents_of_texts_and_of_images(task: Any) -> None:
    from colqwen_lab.errors import BadInput
    from colqwen_lab.retrieval.mteb import MtebModel

    model, image = MtebModel("base", size="tiny"), task[1].page("p0")
    both = model.encode([{"text": ["wheat", None, "ice"], "image": [None, image, None]}])
    apart = [
        model.encode([{"text": ["wheat"]}]),
        model.encode([{"image": [image]}]),
        model.encode([{"text": ["ice"]}]),
    ]
    scores = torch.cat([model.similarity(item, both[:1])[0] for item in apart])
    torch.testing.assert_close(model.similarity(both, both[:1])[:, 0], scores, atol=0.05, rtol=0)
    with pytest.raises(BadInput, match="must have a text or an image"):
        model.encode([{"text": ["wheat", None]}])


def test_padding_and_pairs(task: Any) -> None:
    from colqwen_lab.retrieval.mteb import MtebModel

    model = MtebModel("base", size="tiny", weights="random")
    embeddings = model.encode(
        [{"text": ["wheat", "a much longer question about the price of wheat"]}, {"text": ["x"]}]
    )
    assert embeddings.shape[0] == 3
    assert embeddings[0, -1].abs().sum() == 0
    every = model.similarity(embeddings, embeddings)
    torch.testing.assert_close(model.similarity_pairwise(embeddings, embeddings), every.diagonal())
    torch.testing.assert_close(
        model.similarity(embeddings, embeddings[:, : embeddings.shape[1]]), every
    )
    # A page opposite to the query, and padding that would be nearer.
    query, page = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    assert model.similarity(query, page).item() == -1
