"""The sizes of ColQwen3 and the variants that are compared. Imports no torch.

`data/sizes.json` holds the network's configuration by size. `mid` has a quarter of the 4B's depth
and less than half of its width, so that a CPU runs it in seconds.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from colqwen_lab.errors import BadInput, ambiguous, one_of
from colqwen_lab.settings import DATA

EMBED_DIM = 320
SIZE_VARIABLE = "COLQWEN_LAB_SIZE"  # the default size
SIZES: dict[str, dict[str, Any]] = json.loads((DATA / "sizes.json").read_bytes())
# What the network reads of a config.json by part, beside what it and the inputs cannot vary.
READ = {
    "text_config": {*SIZES["4b"]["text_config"], "rms_norm_eps"},
    "vision_config": {*SIZES["4b"]["vision_config"]},
}
FIXED: dict[str, dict[str, Any]] = {
    "text_config": {"hidden_act": "silu", "attention_bias": False},
    "vision_config": {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16}
    | {"temporal_patch_size": 2, "spatial_merge_size": 2},
}
# The integer weight-only presets of AutoRound that its GPTQ packing holds.
SCHEMES = tuple(f"W{bits}A16{group}" for bits in (2, 3, 4, 8) for group in ("", "G64", "G32"))


def resolve_size(size: str, cuda: bool) -> str:
    """The size's name; `auto` is COLQWEN_LAB_SIZE, else 4b with CUDA, tiny without."""
    size = check_size(size)
    if size == "auto":
        size = check_size(os.environ.get(SIZE_VARIABLE) or "auto", SIZE_VARIABLE)
    return ("4b" if cuda else "tiny") if size == "auto" else size


def check_size(size: str, what: str = "size") -> str:
    """The size's name in lower case, or `auto`. Raises BadInput."""
    return one_of(what, str(size).lower(), ["auto", *SIZES])


def scheme_parts(scheme: str) -> tuple[int, int]:
    """`(bits, group size)` of a scheme: (4, 128) for W4A16. Raises BadInput: an unknown scheme."""
    bits, _, group = one_of("scheme", scheme, SCHEMES)[1:].partition("A16")
    return int(bits), int(group.removeprefix("G") or 128)


class Repository(NamedTuple):
    """A hub repository at a revision; `main` is resolved to a commit at load."""

    name: str
    revision: str = "main"


@dataclass(frozen=True)
class Variant:
    """A model to measure: its AutoRound scheme, None for 16 bits, and where its weights are."""

    name: str
    description: str
    scheme: str | None = None
    hub: dict[str, Repository] = field(default_factory=dict)  # by size or `any`
    folder: Path | None = None


VARIANTS: dict[str, Variant] = {}
for _name, _values in json.loads((DATA / "variants.json").read_bytes()).items():
    _hub = {size: Repository(*source) for size, source in _values.pop("hub").items()}
    VARIANTS[_name] = Variant(_name, hub=_hub, **_values)


def built_in(name: str) -> Variant | None:
    """The variant `base` or `awq`, or of a scheme; None for another name."""
    scheme = name.upper()
    if scheme in SCHEMES:
        return Variant(scheme, f"AutoRound {scheme}, language model only", scheme)
    return VARIANTS.get(name.lower())


def resolve_variant(name: str) -> Variant:
    """The variant `base`, `awq`, a scheme such as W8A16, a folder or a hub id. Raises BadInput."""
    name = os.path.expanduser(name)
    if variant := built_in(name):
        if os.path.exists(os.path.join(name, "config.json")):
            raise ambiguous(name, "a variant")
        return variant
    if os.path.isdir(name):
        own = Path(name).resolve().name
        label = f"./{own}" if built_in(own) else own
        return Variant(label, "a checkpoint folder", folder=Path(name))
    repository = name.removeprefix("hub:")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) and not repository.startswith((".", "/")):
        if repository == name and os.path.isdir(owner := name.split("/")[0]):
            raise BadInput(
                f"the folder {owner} here has no folder {name}; name one that it has, or write "
                f"hub:{name} for the hub's repository"
            )
        return Variant(repository, "a hub repository", hub={"any": Repository(repository)})
    raise BadInput(
        f"model must be {', '.join(VARIANTS)}, a scheme ({SCHEMES[0]} to {SCHEMES[-1]}), "
        f"a checkpoint folder or a hub id OWNER/NAME, got {name!r}"
    )
