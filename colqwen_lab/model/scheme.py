"""A checkpoint's quantization_config: the fields that are read, and the values each may hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from colqwen_lab.settings import DATA

Json = dict[str, Any]
GPTQ, AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
# The values that each field may hold: null is an absent field, group size -1 all inputs of a layer.
# `zero_point` is AutoAWQ's opposite of `sym`; its version GEMV packs along the other dimension.
# `packings` holds other names of these two. Other packings store zero points as they are; GPTQ
# stores them less one.
FIELDS, PACKINGS = json.loads((DATA / "scheme.json").read_bytes()).values()
# AutoRound reads these as regular expressions. One with groups or many stars could hang, and it
# compiles more than 512 again for every layer.
PATTERNS = ("extra_config", "dynamic", "modules_to_not_convert", "modules_in_block_to_quantize")
NAMES = ("block_name_to_quantize", *PATTERNS)
LAYER_NAME = re.compile(r"(?:[-+]:)?\^?(?:\.\*)?(?:[\w.-]|\\\.)*(?:\.\*)?\$?")
MOST_NAMES, MOST_LENGTH = 400, 200


def read_scheme(config: Any) -> Json | None:
    """What AutoRound needs of a quantization_config, by its own names; None for 16-bit weights.

    Raises ValueError: the field, and the values it may hold.
    """
    if config is None:
        return None
    if not isinstance(config, dict):
        raise ValueError("quantization_config must be an object")
    values = {field: _valid(field, config.get(field)) for field in FIELDS}
    method = values["quant_method"]
    name = (values["packing_format"] or "auto") if method == "auto-round" else method
    symmetric = not values["zero_point"] if values["sym"] is None else values["sym"]
    scheme = {"bits": values["bits"], "group_size": values["group_size"], "sym": symmetric}
    scheme |= {"data_type": "int"}
    layers = {field: config[field] for field in NAMES if config.get(field) is not None}
    for field, value in layers.items():
        _check_layers(field, value, scheme)
    packing = {"quant_method": "auto-round", "packing_format": PACKINGS.get(name, name)}
    return scheme | packing | layers


def _valid(field: str, value: Any) -> Any:
    """The value of the field in its own type. Raises ValueError."""
    if value in (valid := FIELDS[field]):
        return valid[valid.index(value)]
    words = ["absent" if one is None else json.dumps(one) for one in valid]
    shown = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    raise ValueError(f"quantization_config.{field} must be {shown}, got {value!r:.100}")


def _check_layers(field: str, value: Any, scheme: Json) -> None:
    """Raise ValueError unless these are names of layers, of `scheme` or 16 bits each."""
    must = f"quantization_config.{field} must"
    try:
        names = list(_names(value))
    except (TypeError, RecursionError):
        raise ValueError(f"{must} name layers, got {value!r:.100}") from None
    odd = [name for name in names if len(name) > MOST_LENGTH or not LAYER_NAME.fullmatch(name)]
    if odd or len(names) > MOST_NAMES:
        got = f"{odd[0]!r:.100}" if odd else f"{len(names)} names"
        raise ValueError(f"{must} name up to {MOST_NAMES} layers, got {got}")
    for own in value.values() if isinstance(value, dict) else ():
        kept = isinstance(own, dict) and own.get("bits") in (16, 32)
        if not kept and (not isinstance(own, dict) or scheme | own != own | scheme):
            raise ValueError(
                f"{must} keep layers at 16 bits or in the scheme of all, got {own!r:.100}"
            )


def _names(value: Any) -> Iterator[str]:
    """All names in a comma-separated text, nested lists, or an object by name. Raises TypeError."""
    if isinstance(value, str):
        yield from value.split(",")
    else:
        for item in value:
            yield from _names(item)


def middle_words(scheme: Json) -> list[int]:
    """The int32 words, repeated along the outputs, that pack symmetric zero points 2^(bits-1)."""
    bits = scheme["bits"]
    zero = 2 ** (bits - 1) - (scheme["packing_format"] == GPTQ)
    stream = sum(zero << bits * place for place in range(32))
    words = [stream >> 32 * place & 0xFFFFFFFF for place in range(bits)]
    return [word - 2**32 if word >= 2**31 else word for word in words]
