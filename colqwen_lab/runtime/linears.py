"""Products: linears that share an input, fused into one and multiplied by a kernel. What `fast` is made of.

A product maps [rows, in] to [rows, out]. Its kernel keeps the weights in one layout; where it offers several schedules,
`fast` times them and `choose`s one for each number of rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model.packing import unpacked

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Below it a product of packed weights waits for the weights; above it tiles that rows fill are worth a try.
FEW_ROWS = 64
MOST_TILE_ROWS = 192
# Of more tiles of rows than these, wide ones are soonest.
FEW_TILES = 4


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(codes, scale [rows, 1])`: each row over its largest value, in FP8."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def features_of(linear: Any) -> tuple[int, int]:
    """`(in, out)` of a linear, of PyTorch or of AutoRound."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.infeatures, linear.outfeatures


@dataclass(frozen=True)
class Unnormed:
    """Rows x whose norm is left to the product that takes them: `weighted` [rows, in] is x times the norm's weights.

    What lacks is dividing by the root of (sum of `squares` / in + `eps`); `squares` [rows, in / 64] sum up those of x.
    """

    weighted: Tensor
    squares: Tensor
    eps: float


class Product(nn.Module):
    """The linears `fused`, multiplied as one. `kernel` is the name that a record gives."""

    kernel = "torch.nn.Linear"
    tunable = False
    dequantises = False
    # Also takes gate and up side by side, twice in_features wide, and opens the gate itself.
    opens = False

    def __init__(self, fused: Sequence[Any]) -> None:
        super().__init__()
        self.linears = len(fused)
        self.in_features = features_of(fused[0])[0]
        self.out_features = sum(features_of(one)[1] for one in fused)
        # Its outputs are a gate and what that opens: a kernel may give SiLU of the one times the other, half as wide.
        self.gates = False
        self.chosen: dict[int, str] = {}

    def schedules(self, rows: int) -> list[str]:
        """What may be chosen among for this many rows, where a kernel is `tunable`; the first is its own choice."""
        return []

    def made_of(self) -> str:
        """What decides, beside its size, which schedules there are."""
        return self.kernel

    def compiles(self, schedule: str) -> bool:
        """Have a schedule compiled; false where this shape or this GPU does not take it."""
        return True

    def kernel_for(self, rows: int) -> str:
        """The name of what multiplies this many rows."""
        return self.kernel

    def dequantise(self, weight: Tensor) -> None:
        """Write the weight [out, in] in 16 bits, where `dequantises`."""
        raise NotImplementedError

    def norms(self, rows: int) -> bool:
        """Whether for this many rows it takes `Unnormed`, and has `add_normed` where it does not open a gate."""
        return False

    def add_normed(
        self, x: Tensor, total: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Unnormed]:
        """`(total + product, its RMS norm)`, the latter left to the next product; where it `norms`."""
        raise NotImplementedError


class Dense(Product):
    """16-bit weights, side by side in one storage; the modules they came from keep views of it."""

    def __init__(self, fused: Sequence[nn.Linear]) -> None:
        super().__init__(fused)
        if len(fused) == 1:
            self.weight = fused[0].weight
            return
        self.weight = nn.Parameter(
            torch.cat([linear.weight for linear in fused]), requires_grad=False
        )
        parts = self.weight.split([linear.out_features for linear in fused])
        for linear, part in zip(fused, parts, strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Prepacked(Product):
    """16-bit weights in oneDNN's own blocked layout, which `torch.nn.Linear` would make anew at every call on a CPU."""

    kernel = "mkldnn._linear_pointwise"

    def __init__(self, fused: Sequence[nn.Linear]) -> None:
        super().__init__(fused)
        whole = torch.cat([linear.weight.detach() for linear in fused])
        self.register_buffer("blocked", torch.ops.mkldnn._reorder_linear_weight(whole))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.blocked, None, "none", [], "")


class Fp8(Product):
    """FP8 weights, a scale an output channel, and FP8 activations, a scale a token: torch's row-wise scaled product."""

    kernel = "torch._scaled_mm (FP8 x FP8)"
    opens = True

    def __init__(self, fused: Sequence[nn.Linear]) -> None:
        super().__init__(fused)
        weight, scale = zip(*(fp8_rows(linear.weight) for linear in fused), strict=True)
        self.register_buffer("weight", torch.cat(weight))
        self.register_buffer("scale", torch.cat(scale).t())
        self.out_dtype = fused[0].weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        from colqwen_lab.runtime.triton_kernels import fp8_rows_at_once

        codes, scale = fp8_rows_at_once(x, self.in_features)
        weight: Any = self.weight
        return torch._scaled_mm(
            codes,
            weight.t(),
            scale,
            self.scale,  # type: ignore[arg-type]
            out_dtype=self.out_dtype,
            use_fast_accum=True,
        )


class AsLoaded(Product):
    """The modules of AutoRound's own backend, one after the other; `load_fast` names it after that."""

    kernel = "modules"

    def __init__(self, fused: Sequence[nn.Module]) -> None:
        super().__init__(fused)
        self.modules_ = nn.ModuleList(fused)

    def forward(self, x: Tensor) -> Tensor:
        results = [module(x) for module in self.modules_]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def gptq(fused: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`(qweight, qzeros, scales)` of modules in the GPTQ layout, side by side along their outputs."""
    return tuple(
        torch.cat([getattr(one, name) for one in fused], dim=1)
        for name in ("qweight", "qzeros", "scales")
    )  # type: ignore[return-value]


class Int4Cpu(Product):
    """torch's int4 product for CPUs: weights dequantised in registers, (code - 8) * scale + zero."""

    kernel = "torch._weight_int4pack_mm_for_cpu"

    def __init__(self, fused: Sequence[Any]) -> None:
        super().__init__(fused)
        qweight, qzeros, scales = gptq(fused)
        self.group_size = fused[0].group_size
        codes = unpacked(qweight, 4, 0).t().contiguous().to(torch.int32)
        zeros = unpacked(qzeros, 4, 1).to(scales.dtype) + stored_less(fused[0])
        self.register_buffer(
            "qweight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        )
        both = torch.stack([scales, (8 - zeros) * scales], dim=-1)
        self.register_buffer("scales", both.to(torch.bfloat16).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        packed = (self.qweight, self.group_size, self.scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), *packed).to(x.dtype)


class Humming(Product):
    """humming-kernels: W4A16, and W4A8 with FP8 or INT8 activations, compiled for this GPU at first use."""

    tunable = True

    def __init__(self, fused: Sequence[Any], activations: str | None = None) -> None:
        super().__init__(fused)
        from humming.layer import HummingLayer
        from humming.schema.autoround import AutoRoundWeightSchema

        first = fused[0]
        self.kernel = f"humming (W{first.bits}A{8 if activations else 16}{' ' + activations if activations else ''})"
        qweight, qzeros, scales = gptq(fused)
        packing = "auto_round:auto_gptq" if stored_less(first) else "auto_round:gptqmodel"
        schema = AutoRoundWeightSchema(
            bits=first.bits, group_size=first.group_size, sym=first.sym, packing_format=packing
        )
        self.layer = HummingLayer(
            shape_n=qweight.shape[1],
            shape_k=first.infeatures,
            weight_config=schema,
            input_config={"dtype": activations} if activations else None,
            pad_n_to_multiple=64,
            pad_k_to_multiple=32,
            torch_dtype=torch.bfloat16,
        ).to(qweight.device)
        self.layer.load_from_tensors(
            {"qweight": qweight, "qzeros": qzeros, "scales": scales.to(torch.bfloat16)}
        )
        self.layer.transform()
        # The lab's own kernels read this layout: unsigned codes, symmetric, groups of 128, whole tiles, on Hopper.
        whole = (
            qweight.shape[1] % 128 == 0 and first.infeatures % 128 == 0 and first.group_size == 128
        )
        alike = str(self.layer.humming_config.b_dtype) == "uint4" and first.sym and not activations
        self.dequantises = whole and alike and _capability(qweight.device)[0] == 9

    def schedules(self, rows: int) -> list[str]:
        """humming's own for this many rows, it with one thing changed, and `few_rows`."""
        from humming.tune import get_heuristics_config

        own = get_heuristics_config(
            self.layer.humming_config, rows, device=torch.cuda.current_device()
        )
        once = {
            "evict_weights_first": True
        }  # a forward reads them once; what it reads again stays in the cache
        changes: list[dict[str, Any]] = [{}, once]
        if rows <= FEW_ROWS:
            changes += [
                once | {"num_stages": 6},
                once | {"num_ctas_per_sm": 3},
                _low(-(-rows // 16) * 16),
            ]
        else:
            fewest = -(-rows // MOST_TILE_ROWS)
            for height in (-(-rows // tiles // 8) * 8 for tiles in range(fewest, fewest + 3)):
                changes.append(once | _tile(height, 256, 1))
                changes += [once | _tile(height, 128, 2)] if fewest <= FEW_TILES else []
        found = list(
            dict.fromkeys(json.dumps({**own, **change}, sort_keys=True) for change in changes)
        )

        if self.dequantises:
            from colqwen_lab.runtime import w4

            found += w4.few_rows_schedules(self.in_features, self.out_features, rows, self.gates)
        return found

    def made_of(self) -> str:
        return f"{self.layer.humming_config.to_str()} {self.dequantises}"

    def compiles(self, schedule: str) -> bool:
        from humming.kernel.humming import HummingKernel

        try:
            if not self._own(schedule):
                config, device = self.layer.humming_config.to_str(), torch.cuda.current_device()
                HummingKernel.prepare_kernels(config, None, schedule, device)
        except Exception:  # which humming says in several ways
            return False
        return True

    def forward(self, x: Tensor | Unnormed) -> Tensor:
        rows = x.weighted if isinstance(x, Unnormed) else x
        schedule = self.chosen.get(rows.shape[0])
        if own := self._own(schedule):
            return own(x, self.layer.weight, self.layer.weight_scale)
        assert rows is x
        return self.layer(rows.contiguous(), tuning_config=schedule)

    def norms(self, rows: int) -> bool:
        return self._own(self.chosen.get(rows)) is not None

    def add_normed(
        self, x: Tensor, total: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Unnormed]:
        own = self._own(self.chosen[x.shape[0]])
        return own(x, self.layer.weight, self.layer.weight_scale, (total, weight, eps))

    def _own(self, schedule: str | None) -> Any:
        if not schedule or not self.dequantises:
            return None
        from colqwen_lab.runtime import w4

        return w4.few_rows_of(schedule)

    def kernel_for(self, rows: int) -> str:
        return "few_rows (W4A16)" if self._own(self.chosen.get(rows)) else self.kernel

    def dequantise(self, weight: Tensor) -> None:
        from colqwen_lab.runtime import w4

        w4.Dequantise()(self.layer.weight, self.layer.weight_scale, weight)


def _tile(height: int, width: int, blocks_at_once: int) -> dict[str, Any]:
    """A change of humming's schedule: what one block multiplies, and how many blocks a multiprocessor runs at once."""
    shapes = {"block_shape": (height, width, 64), "warp_shape": (height, 32, 64)}
    return shapes | {"multi_cast_size_a": 1, "num_stages": 4, "num_ctas_per_sm": blocks_at_once}


def _low(height: int) -> dict[str, Any]:
    """A change of humming's schedule to the products of single warps, which load for themselves."""
    shapes = {
        "block_shape": (height, 64, 128),
        "warp_shape": (height, 32, 64),
        "num_stages": 4,
        "num_ctas_per_sm": 2,
    }
    return shapes | {
        "mma_type": "mma",
        "use_stream_k": True,
        "use_tma": False,
        "use_warp_spec": False,
    }


def stored_less(module: Any) -> int:
    """1 where a module's zero points are stored less one, as the GPTQ packing does; AutoRound's class says which."""
    return int(type(module).__module__.endswith("_zp"))


@cache
def compiled(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    """`function`, fused by the compiler on a GPU: once for all batches and lengths, and for each width of its own.

    With a width that is known only at the call, a fused kernel divides by it for every element and cannot load several
    at once.
    """
    if not on_gpu:
        return function
    fused = torch.compile(function, dynamic=False)

    def call(*args: Any) -> Any:
        for one in args:
            if isinstance(one, Tensor) and one.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(one, list(range(one.ndim - 1)))
        return fused(*args)

    return call


@dataclass(frozen=True)
class Kernel:
    """A kernel that `fast` may multiply by: how it is built, why it cannot serve here (empty where it can), and whether
    it multiplies in bfloat16 alone.
    """

    build: Callable[[Sequence[Any]], Product]
    unmet: Callable[[torch.device, tuple[int, int] | None], str]
    bfloat16: bool = False


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _needs(
    least: tuple[int, int], package: str = "", packed: bool = True
) -> Callable[[torch.device, tuple[int, int] | None], str]:
    def unmet(device: torch.device, scheme: tuple[int, int] | None) -> str:
        if packed is (scheme is None):
            return f"multiplies {'packed' if packed else '16-bit'} weights, made so at load"
        if _capability(device) < least:
            return f"needs a CUDA GPU of compute capability {least[0]}.{least[1]} or newer"
        if package and find_spec(package) is None:
            return f"needs the package {package}-kernels: pip install 'colqwen-lab[gpu]'"
        return ""

    return unmet


def _int4_cpu(device: torch.device, scheme: tuple[int, int] | None) -> str:
    if device.type != "cpu":
        return "runs on a CPU"
    if scheme is None or scheme[0] != 4 or scheme[1] not in (32, 64, 128, 256):
        return "takes 4 bits in groups of 32, 64, 128 or 256"
    return ""


# For packed weights, best first; the last one serves everywhere.
PACKED_KERNELS = {
    "humming": Kernel(Humming, _needs((7, 5), "humming"), bfloat16=True),
    "int4": Kernel(Int4Cpu, _int4_cpu),
    "modules": Kernel(
        AsLoaded, lambda device, scheme: "" if scheme else "multiplies packed weights"
    ),
}


def dense_product(
    device: torch.device, dtype: torch.dtype
) -> Callable[[Sequence[nn.Linear]], Product]:
    """The best product of 16-bit weights here."""
    blocked = (
        device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    )
    return Prepacked if blocked and torch.ops.mkldnn._is_mkldnn_bf16_supported() else Dense


# 8-bit activations: never a default. The first makes FP8 weights of 16-bit ones, the others multiply packed weights.
EIGHT_BIT = {
    "fp8": Kernel(Fp8, _needs((8, 9), packed=False)),
    "w4-fp8": Kernel(
        partial(Humming, activations="float8e4m3"), _needs((8, 9), "humming"), bfloat16=True
    ),
    "w4-int8": Kernel(
        partial(Humming, activations="int8"), _needs((8, 0), "humming"), bfloat16=True
    ),
}


def pick(name: str, device: torch.device, scheme: tuple[int, int] | None) -> Kernel:
    """The kernel of this name for weights of `scheme` (bits, group size; None is 16 bits); of `auto` the best here.

    Raises:
        BadInput: no such kernel.
        MissingRequirement: it cannot serve here; says why, and which can.
    """
    known = PACKED_KERNELS | EIGHT_BIT
    if name != "auto" and name not in known:
        raise BadInput(f"unknown kernel {name!r}; valid for fast: auto, {', '.join(known)}")
    can = [one for one in known if not known[one].unmet(device, scheme)]
    if name == "auto":
        return known[can[0]]
    if name not in can:
        raise MissingRequirement(
            f"kernel {name} {known[name].unmet(device, scheme)}; valid here: {', '.join(['auto', *can])}"
        )
    return known[name]
