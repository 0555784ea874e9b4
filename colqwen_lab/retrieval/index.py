"""How page embeddings are stored: index formats, their bytes, exact scores, and files.

A format keeps fewer vectors of a page (token pooling), fewer of their values, or fewer bits a
value. Scores are MaxSim over the stored values; query vectors stay in 16 bits, except that
`hamming` keeps their signs only. On a GPU a kernel of the lab reads each page once; elsewhere torch
multiplies chunk by chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from torch.nn.functional import normalize, pad

from colqwen_lab.errors import BadInput
from colqwen_lab.settings import writable_folder, write_file

VALUES = ("bfloat16", "float16", "int8", "binary", "hamming")
PARTS = re.compile(
    rf"(?P<values>{'|'.join(VALUES)})|pool(?P<pool>\d{{1,4}})|dims(?P<dims>\d{{1,4}})"
)
BITS = 8  # signs in a stored byte
INT8_MAX = 127
KIND = "colqwen-lab index"
# Decoded vectors, or products, in memory at once: a CPU's cache holds them; a GPU needs few chunks.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
SHARD = "shard-{:05}.safetensors"
NEW = r"\Z"  # an empty file, or none: a shard replaces no other


class Queries(NamedTuple):
    """Query vectors [tokens, dims] in 16 bits, and how many each query has [queries]."""

    vectors: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Format:
    """How the vectors of a page are stored.

    `values` is one of `VALUES`: `int8` has a scale a vector; `binary` and `hamming` keep signs.
    `pool` is the factor of token pooling, 1 for none; `dims` keeps the first values of a vector, 0
    for all.
    """

    values: str = "bfloat16"
    pool: int = 1
    dims: int = 0

    @classmethod
    def parse(cls, name: str) -> Self:
        """The format of a name such as `int8`, `pool3` or `binary-pool3-dims128`.

        Raises BadInput for another name.
        """
        fields: dict[str, Any] = {}
        for part in name.lower().split("-"):
            match = PARTS.fullmatch(part)
            key = (match and match.lastgroup) or ""
            value: Any = match and match[key]
            value = value if key == "values" else int(value or 0)
            if not value or key in fields:
                raise BadInput(
                    f"format must be {', '.join(VALUES)}, poolN or dimsN, or these joined by -, "
                    f"got {name!r}"
                )
            fields[key] = value
        return cls(**fields)

    @property
    def name(self) -> str:
        """The shortest name that `parse` reads."""
        parts = [self.values] if self.values != "bfloat16" or self == Format() else []
        parts += [f"pool{self.pool}"] if self.pool > 1 else []
        return "-".join(parts + ([f"dims{self.dims}"] if self.dims else []))

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit type in which this format is multiplied; codes and signs fit it exactly."""
        return torch.float16 if self.values == "float16" else torch.bfloat16

    @property
    def bits(self) -> bool:
        """Whether a value is stored as its sign."""
        return self.values in ("binary", "hamming")

    def queries(self, queries: Sequence[Tensor]) -> Queries:
        """Query vectors [tokens, 320] as this format multiplies them."""
        vectors = self._cut(torch.cat(list(queries)))
        vectors = _signs(vectors) if self.values == "hamming" else vectors
        lengths = torch.tensor([len(query) for query in queries]).to(vectors.device)
        return Queries(vectors.to(self.dtype), lengths)

    def factor(self, dims: int) -> float:
        """What makes unit vectors of signs; 1 for other values."""
        return {"binary": dims**-0.5, "hamming": 1 / dims}.get(self.values, 1.0)

    def _cut(self, vectors: Tensor) -> Tensor:
        return normalize(vectors[:, : self.dims].float(), dim=-1) if self.dims else vectors.float()

    def store(self, page: Tensor) -> dict[str, Tensor]:
        """`vectors` and, for int8, `scales` of a page [tokens, 320], as a file keeps them."""
        return self.encode(pooled(page.float(), self.pool))

    def encode(self, vectors: Tensor) -> dict[str, Tensor]:
        """The same of vectors [vectors, 320] that are pooled already."""
        vectors = self._cut(vectors)
        if self.values == "int8":
            scales = (vectors.abs().amax(1, keepdim=True) / INT8_MAX).half()
            codes = (vectors / scales.float().clamp(min=1e-12)).round().clamp(-INT8_MAX, INT8_MAX)
            return {"vectors": codes.to(torch.int8), "scales": scales}
        if self.bits:
            whole = pad((vectors >= 0).to(torch.uint8), (0, -vectors.shape[1] % BITS))
            bits = whole.unflatten(1, (-1, BITS)) << _places(vectors.device)
            return {"vectors": bits.sum(-1, dtype=torch.uint8)}
        return {"vectors": vectors.to(self.dtype)}

    def codes(self, vectors: Tensor, dims: int) -> Tensor:
        """Stored vectors as numbers [vectors, dims] in 16 bits: values, int8 codes, or -1 and 1."""
        if not self.bits:
            return vectors.to(self.dtype)
        bits = (vectors.unsqueeze(-1) >> _places(vectors.device) & 1).flatten(1)[:, :dims]
        return 2 * bits.to(self.dtype) - 1


def _places(device: torch.device) -> Tensor:
    return torch.arange(BITS - 1, -1, -1, device=device, dtype=torch.uint8)


def _signs(vectors: Tensor) -> Tensor:
    """-1 and 1; zero counts as positive."""
    return torch.where(vectors >= 0, 1.0, -1.0)


def pooled(page: Tensor, factor: int) -> Tensor:
    """A page [tokens, dim] as about tokens / factor unit vectors: the means of its clusters.

    Hierarchical clustering with Ward's linkage. Source: Clavié, Chaffin and Adams 2024, "Reducing
    the Footprint of Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling".
    """
    count = -(-len(page) // factor)
    if factor == 1 or len(page) < 2:
        return page
    clusters = fcluster(linkage(page.double().numpy(), "ward"), count, "maxclust") - 1
    places = torch.from_numpy(clusters.astype(np.int64))
    sums = page.new_zeros(int(places.max()) + 1, page.shape[1]).index_add_(0, places, page)
    return normalize(sums, dim=-1)


@dataclass(frozen=True)
class Index:
    """Pages in a format: stored `vectors` and `scales`, `lengths` [pages] in vectors, and ids.

    `dims` is the number of values of a vector. `about` names the model and its weights.
    """

    format: Format
    dims: int
    page_ids: tuple[str, ...]
    lengths: Tensor
    vectors: Tensor
    scales: Tensor | None
    about: dict[str, str]

    @classmethod
    def build(
        cls, format: Format, pages: Sequence[Tensor], page_ids: Sequence[str], **about: str
    ) -> Self:
        """The index of pages [tokens, 320]. Raises BadInput for none, or more values than 320."""
        if not pages:
            raise BadInput("an index needs at least one page")
        width = pages[0].shape[1]
        if format.dims > width:
            raise BadInput(f"dims must be 1 to {width}, got {format.dims}")
        stored = [format.store(page.cpu()) for page in pages]
        joined = {name: torch.cat([page[name] for page in stored]) for name in stored[0]}
        lengths = torch.tensor([len(page["vectors"]) for page in stored])
        vectors, scales = joined["vectors"], joined.get("scales")
        dims = format.dims or width
        return cls(format, dims, tuple(page_ids), lengths, vectors, scales, about)

    @property
    def page_bytes(self) -> float:
        """What a page takes in a file, with its id, its length and its scales.

        A file also has a header, of less than 600 bytes.
        """
        tensors = [self.vectors, self.lengths, *([] if self.scales is None else [self.scales])]
        ids = len(json.dumps(self.page_ids))
        return (sum(tensor.nbytes for tensor in tensors) + ids) / len(self.page_ids)

    def to(self, device: torch.device | str) -> Index:
        """The index with its vectors on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, vectors=self.vectors.to(device), scales=scales)

    def first(self, pages: int) -> Index:
        """The index of the first pages; vectors are shared."""
        rows = int(self.lengths[:pages].sum())
        return replace(
            self,
            page_ids=self.page_ids[:pages],
            lengths=self.lengths[:pages],
            vectors=self.vectors[:rows],
            scales=None if self.scales is None else self.scales[:rows],
        )

    @property
    def stored_bytes(self) -> int:
        """The bytes that a search reads: vectors and scales."""
        return self.vectors.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @cached_property
    def starts(self) -> Tensor:
        """The first vector of each page, and the end of the last [pages + 1]; by the vectors."""
        return pad(self.lengths.cumsum(0), (1, 0)).to(self.vectors.device)

    def scores(self, queries: Sequence[Tensor] | Queries, kernel: str = "") -> Tensor:
        """MaxSim scores [queries, pages] in float32, exact for the stored values.

        `kernel` is triton or torch; the default is triton on a CUDA GPU, else torch.
        """
        device = self.vectors.device
        if not isinstance(queries, Queries):
            queries = self.format.queries([query.to(device) for query in queries])
        best = self._best(queries.vectors, kernel or kernels_of(device)[0])
        best = best.T.contiguous() * self.format.factor(self.dims)
        return torch.segment_reduce(best, "sum", lengths=queries.lengths, initial=0)

    def _best(self, tokens: Tensor, kernel: str) -> Tensor:
        """The largest product [pages, tokens] of each query token with a page's vectors."""
        if kernel == "triton":
            from colqwen_lab.runtime.triton_kernels import best_products

            stored = self.vectors, self.scales, self.starts
            return best_products(*stored, tokens, self.format.bits)
        return torch.cat([*self._best_by_chunk(tokens)])

    def _best_by_chunk(self, tokens: Tensor) -> Iterator[Tensor]:
        """The largest products [pages, tokens] of some pages after the other."""
        rows = max(1, CHUNK_BYTES[tokens.device.type] // (4 * max(tokens.shape)))
        starts = self.lengths.cumsum(0) - self.lengths
        _, counts = torch.unique_consecutive(starts // rows, return_counts=True)
        pages = self.lengths.split(counts.tolist())
        vectors = [int(lengths.sum()) for lengths in pages]
        scales = [None] * len(pages) if self.scales is None else self.scales.split(vectors)
        for lengths, stored, scale in zip(pages, self.vectors.split(vectors), scales, strict=True):
            products = _products(self.format.codes(stored, self.dims), tokens)
            if scale is not None:
                products *= scale
            if lengths.min() == lengths.max() > 0:
                yield products.unflatten(0, (len(lengths), -1)).amax(1)
            else:
                each = lengths.to(products.device)
                yield torch.segment_reduce(products, "max", lengths=each, initial=-torch.inf)

    def to_bytes(self) -> bytes:
        """The file of this index."""
        header = {
            "kind": KIND,
            "format": self.format.name,
            "dims": self.dims,
            "page_ids": self.page_ids,
            **self.about,
        }
        tensors = {"vectors": self.vectors, "lengths": self.lengths}
        tensors |= {} if self.scales is None else {"scales": self.scales}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        return save(tensors, {"header": json.dumps(header)})


def _products(codes: Tensor, tokens: Tensor) -> Tensor:
    """Products [vectors, tokens] in float32 of 16-bit numbers."""
    if codes.device.type == "cuda":
        return torch.mm(codes, tokens.T, out_dtype=torch.float32)
    return codes.float() @ tokens.float().T


def kernels_of(device: torch.device) -> tuple[str, ...]:
    """The kernels that score on a device, the default first."""
    triton = device.type == "cuda" and find_spec("triton") is not None
    return ("triton", "torch") if triton else ("torch",)


# ---------------------------------------------------------------- files


def append(folder: Path, index: Index) -> Path:
    """Write `index` as the next shard of a folder; returns the shard's path.

    A shard appears whole or not at all. Raises BadInput if the folder holds another model or
    format, or a page of this id.
    """
    shards = read(folder) if folder.is_dir() else []
    for shard in shards:
        for what, ours, theirs in (
            ("format", index.format.name, shard.format.name),
            ("values a vector", index.dims, shard.dims),
            *((name, value, shard.about.get(name)) for name, value in index.about.items()),
        ):
            if ours != theirs:
                raise BadInput(f"{folder} is an index of {what} {theirs}, got {ours}")
        if repeated := {*index.page_ids} & {*shard.page_ids}:
            raise BadInput(f"{folder} already holds page {min(repeated)}")
    return write_shard(folder, len(shards), index)


def write_shard(folder: Path, number: int, index: Index) -> Path:
    """Write `index` as shard `number`, which is new; returns its path. Other shards are not read.

    Raises BadInput if it exists.
    """
    return write_file(writable_folder(folder) / SHARD.format(number), index.to_bytes(), NEW)


def read(folder: Path) -> list[Index]:
    """The shards of a folder, memory-mapped, in the order of writing.

    Raises BadInput, with the file's name, for a file that is torn or no shard, and for a gap.
    """
    paths = sorted(folder.glob(SHARD.format(0).replace("00000", "*")))
    for number, path in enumerate(paths):
        if path.name != SHARD.format(number):
            raise BadInput(f"{folder} lacks {SHARD.format(number)}")
    return [_read(path) for path in paths]


def _read(path: Path) -> Index:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"{path} is torn, or not an index: {error!s:.200}") from None
    try:
        if header.pop("kind") != KIND:
            raise KeyError
        form, ids = Format.parse(header.pop("format")), tuple(header.pop("page_ids"))
        index = Index(
            form,
            header.pop("dims"),
            ids,
            scales=tensors.pop("scales", None),
            about=header,
            **tensors,
        )
        whole = len(ids) == len(index.lengths) and int(index.lengths.sum()) == len(index.vectors)
    except (BadInput, KeyError, TypeError):
        raise BadInput(f"{path} is not an index of colqwen-lab") from None
    if not whole:
        raise BadInput(f"{path} is torn: its pages and its vectors differ in number")
    return index


def scores(shards: Sequence[Index], queries: Sequence[Tensor]) -> Tensor:
    """Scores [queries, pages] over all shards, in the order of their pages."""
    return torch.cat([shard.scores(queries) for shard in shards], dim=1)
