from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colqwen_lab.errors import BadInput
from colqwen_lab.hardware import (
    ARCHITECTURES,
    GPUS,
    OUTSIDE_TORCH_BYTES,
    find_card,
    fit_of,
    gpu_of,
    need_bytes,
    outside_bytes,
    usable,
)
from colqwen_lab.records import GIB, MIB, Memory

# Goldens: GiB, GB/s, multiprocessors, GHz, 16-bit multiply-adds, ECC.
FIRST_GPUS = {
    "RTX 3060 8GB": (8, 240, 28, 1.777, 256, False),
    "RTX 3060": (12, 360, 28, 1.777, 256, False),
    "RTX 3070": (8, 448, 46, 1.725, 256, False),
    "RTX 3080": (10, 760, 68, 1.71, 256, False),
    "RTX 4060": (8, 272, 24, 2.46, 256, False),
    "RTX 4060 Ti 16GB": (16, 288, 34, 2.535, 256, False),
    "RTX 4070": (12, 504, 46, 2.475, 256, False),
    "RTX 4080": (16, 716.8, 76, 2.505, 256, False),
    "RTX 4090": (24, 1008, 128, 2.52, 256, False),
    "RTX 5070": (12, 672, 48, 2.512, 256, False),
    "RTX 5080": (16, 960, 84, 2.617, 256, False),
    "RTX 5090": (32, 1792, 170, 2.407, 256, False),
    "T4": (16, 320, 40, 1.59, 512, True),
    "L4": (24, 300, 58, 2.04, 512, True),
    "A10": (24, 600, 72, 1.695, 512, True),
    "A100 40GB": (40, 1555, 108, 1.41, 1024, False),
    "A100 80GB": (80, 2039, 108, 1.41, 1024, False),
    "L40S": (48, 864, 142, 2.49, 512, True),
    "H100": (80, 3350, 132, 1.83, 2048, False),
    "H200": (141, 4800, 132, 1.83, 2048, False),
}
# Dense 16-bit TFLOP/s with 32-bit accumulation, from NVIDIA's data sheets and whitepapers.
VENDOR_TFLOPS = {
    "RTX 3070": 40.6,
    "RTX 3080": 59.5,
    "RTX 3090": 71,
    "RTX 3090 Ti": 80,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
    "T4": 65,
    "A2": 18,
    "A10": 125,
    "A10G": 70,
    "A16": 17.9,
    "A30": 165,
    "A40": 149.7,
    "A100 40GB": 312,
    "A100 PCIe 80GB": 312,
    "L4": 121,
    "L40": 181.05,
    "L40S": 362.05,
    "RTX A2000 12GB": 63.9 / 2,
    "RTX A4000": 153.4 / 2,
    "RTX A4500": 189.2 / 2,
    "RTX A5000": 222.2 / 2,
    "RTX A5500": 272.8 / 2,
    "RTX A6000": 309.7 / 2,
    "RTX 2000 Ada": 191.9 / 4,
    "RTX 4000 SFF Ada": 306.8 / 4,
    "RTX 4500 Ada": 634.0 / 4,
    "RTX 5000 Ada": 1044.4 / 4,
    "RTX 6000 Ada": 1457.0 / 4,
    "RTX PRO 6000 Blackwell": 503.8,
    "RTX PRO 6000 Blackwell Max-Q": 3511 / 8,
    "H100": 989.4,
    "H100 PCIe": 756,
    "H100 NVL": 1671 / 2,
    "H200": 989.4,
    "H200 NVL": 1671 / 2,
    "GH200 96GB": 990,
    "B200": 2250,
}
# NVIDIA's "AI TOPS": sparse FP8 (RTX 40) or FP4 (RTX 50) with 16-bit accumulation.
AI_TOPS = {
    "RTX 4060": 242,
    "RTX 4060 Ti 8GB": 353,
    "RTX 4070": 466,
    "RTX 4070 SUPER": 568,
    "RTX 4070 Ti": 641,
    "RTX 4070 Ti SUPER": 706,
    "RTX 4080 SUPER": 836,
    "RTX 4090": 1321,
    "RTX 5050": 421,
    "RTX 5060": 614,
    "RTX 5060 Ti 16GB": 759,
    "RTX 5070": 988,
    "RTX 5070 Ti": 1406,
    "RTX 5080": 1801,
    "RTX 5090": 3352,
}


@pytest.mark.parametrize("name", FIRST_GPUS)
def test_the_first_gpus_keep_their_values(name: str) -> None:
    gpu = GPUS[name]
    values = (gpu.memory_gib, gpu.bandwidth_gb_s, gpu.multiprocessors, gpu.boost_ghz)
    assert (*values, ARCHITECTURES[gpu.architecture][0], gpu.ecc) == FIRST_GPUS[name]


@pytest.mark.parametrize(("name", "tflops"), VENDOR_TFLOPS.items())
def test_dense_rates_match_the_vendor(name: str, tflops: float) -> None:
    assert GPUS[name].flops() / 1e12 == pytest.approx(tflops, rel=0.007)


@pytest.mark.parametrize(("name", "tops"), AI_TOPS.items())
def test_geforce_rates_match_the_vendor_s_ai_tops(name: str, tops: float) -> None:
    sparse = 16 if GPUS[name].architecture == "Blackwell GeForce" else 8
    assert sparse * GPUS[name].flops() / 1e12 == pytest.approx(tops, rel=0.002)


@pytest.mark.parametrize(
    ("name", "dtype", "tops"),
    [
        ("A100 80GB", "int8", 624),
        ("A40", "int8", 299.3),
        ("T4", "int8", 130),
        ("RTX 3090", "int8", 284),
        ("RTX 4090", "int8", 660.6),
        ("RTX 4090", "fp8", 330.3),
        ("L40", "fp8", 362),
        ("L40S", "fp8", 733),
        ("H100", "fp8", 1979),
        ("B200", "fp8", 4500),
        ("A100 80GB", "fp8", 0),
        ("A100 80GB", "float16", 312),
    ],
)
def test_eight_bit_rates(name: str, dtype: str, tops: float) -> None:
    assert GPUS[name].flops(dtype) / 1e12 == pytest.approx(tops, rel=0.015)


def test_every_row_is_complete_and_plausible() -> None:
    assert len(GPUS) >= 80
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert "NVIDIA" in gpu.source
        assert gpu.architecture in ARCHITECTURES
        assert 4 <= gpu.memory_gib <= 200
        assert 1.1 <= gpu.boost_ghz <= 2.7
        assert 150 <= gpu.bandwidth_gb_s <= 8000
    assert GPUS["L4"].compute_capability == (8, 9)
    assert GPUS["A100 40GB"].compute_capability == (8, 0)


@pytest.mark.parametrize(
    ("name", "mib"), [("L4", 23034), ("L40S", 46068), ("T4", 15360), ("A2", 15356), ("A10G", 23028)]
)
def test_ecc_takes_a_sixteenth(name: str, mib: int) -> None:
    """The right side is what nvidia-smi shows."""
    assert find_card(name).nominal_bytes / MIB == pytest.approx(mib, rel=0.001)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("rtx4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("GeForce 4070", "RTX 4070"),
        ("4070 ti super", "RTX 4070 Ti SUPER"),
        ("RTX 4070 Ti SUPER 16GB", "RTX 4070 Ti SUPER"),
        ("A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("h100", "H100"),
        ("h100 sxm", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Server"),
        ("rtx pro 6000", "RTX PRO 6000 Blackwell"),
        ("B200 192GB", "B200"),
        ("4090 mobile", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop 6GB"),
        ("rtx_3050_6gb_laptop", "RTX 3050 Laptop 6GB"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU 16GB", "RTX 3080 Laptop 16GB"),
        ("rtx 3060", "RTX 3060"),
        ("RTX 3060 (8 GB)", "RTX 3060 8GB"),
        ("3080 10gb", "RTX 3080"),
        ("3080 12gb", "RTX 3080 12GB"),
        ("RTX 4060 Ti 8 GB", "RTX 4060 Ti 8GB"),
    ],
)
def test_cards_by_any_usual_name(name: str, card: str) -> None:
    assert (find_card(name).name, find_card(name).gpu) == (card, GPUS[card])


@given(data=st.data())
def test_every_gpu_is_found_in_any_spelling(data: st.DataObject) -> None:
    gpu = data.draw(st.sampled_from(list(GPUS.values())))
    words = re.sub(r"(?<=\d)GB", "GB" if data.draw(st.booleans()) else " GiB", gpu.name)
    separator = data.draw(st.sampled_from([" ", "-", "_", "  "]))
    spelling = data.draw(st.sampled_from([str, str.lower, str.upper, str.title]))
    brand = data.draw(st.sampled_from(["", "NVIDIA ", "NVIDIA GeForce ", "nvidia-", "Tesla "]))
    size = "" if re.search("GB", gpu.name) else data.draw(st.sampled_from(["", " %gGB", " %g GB"]))
    end = data.draw(st.sampled_from(["", " GPU", "  "]))
    full = brand + words.replace(" ", separator) + (size and size % gpu.memory_gib) + end
    assert find_card(spelling(full)).gpu == gpu


@given(data=st.data())
def test_the_driver_s_name_and_memory_select_the_gpu(data: st.DataObject) -> None:
    gpu = data.draw(st.sampled_from(list(GPUS.values())))
    share = data.draw(st.floats(0.967, 1))
    name = f"NVIDIA {re.sub(r' [0-9]+GB', '', gpu.name)}"
    assert gpu_of(name, round(share * gpu.visible_bytes)) == gpu


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("Intel(R) Xeon(R) Processor", None),
        ("", None),
    ],
)
def test_the_gpu_of_a_record(device: str, name: str | None) -> None:
    assert gpu_of(device) == (GPUS[name] if name else None)


@pytest.mark.parametrize(
    ("device", "memory_bytes", "name"),
    [
        ("NVIDIA GeForce RTX 3060", 8 * GIB, "RTX 3060 8GB"),
        ("NVIDIA GeForce RTX 3060", 12 * GIB, "RTX 3060"),
        ("NVIDIA GeForce RTX 4060 Ti", 8 * GIB, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 16 * GIB, "RTX 3080 Laptop 16GB"),
        ("NVIDIA H100 80GB HBM3", 85017493504, "H100"),
        ("NVIDIA H200", 150109880320, "H200"),
        ("NVIDIA GH200 480GB", 97871 * MIB, "GH200 96GB"),
        ("NVIDIA GH200 144G HBM3e", 153008209920, "GH200 144GB"),
        ("NVIDIA B200", 182642 * MIB, "B200"),
        ("NVIDIA A10G", 22587 * MIB, "A10G"),
        ("NVIDIA GeForce RTX 4090", 48 * GIB, None),
    ],
)
def test_memory_tells_gpus_of_one_name_apart(
    device: str, memory_bytes: int, name: str | None
) -> None:
    assert gpu_of(device, memory_bytes) == (GPUS[name] if name else None)


@pytest.mark.parametrize("budget", ["8", "8GB", "8gb", "8 GiB", " 8 ", 8, 8.0, "8.0", "8."])
def test_a_budget_in_gb(budget: Any) -> None:
    card = find_card(budget)
    assert (card.name, card.nominal_bytes, card.gpu) == ("8 GB", 8 * GIB, None)


@given(st.integers(1, 1024).filter(lambda size: size not in (100, 200)))
def test_small_numbers_are_budgets(size: int) -> None:
    """40 is 40 GB, not an A40."""
    for budget in (size, str(size), f"{size}GB", float(size)):
        assert (find_card(budget).nominal_bytes, find_card(budget).gpu) == (size * GIB, None)


@pytest.mark.parametrize(
    ("number", "question"),
    [
        ("4070", "4070 GB is not a card; did you mean RTX 4070?"),
        (4070, "4070 GB is not a card; did you mean RTX 4070?"),
        (4070.0, "4070 GB is not a card; did you mean RTX 4070?"),
        ("4070GB", "4070 GB is not a card; did you mean RTX 4070?"),
        ("3090", "3090 GB is not a card; did you mean RTX 3090?"),
        ("3050", "3050 GB is not a card; did you mean RTX 3050 6GB or RTX 3050 8GB?"),
        ("5000", "5000 GB is not a card; did you mean RTX A5000 or RTX 5000 Ada?"),
        ("2080", "2080 GB is not a card; at most 1024 GB"),
        ("1025", "1025 GB is not a card; at most 1024 GB"),
    ],
)
def test_a_number_that_is_a_gpu_s_name_is_asked_back(number: Any, question: str) -> None:
    with pytest.raises(BadInput) as error:
        find_card(number)
    assert str(error.value) == question


def test_one_hundred_without_a_unit_may_be_an_a100() -> None:
    with pytest.raises(BadInput, match=r"did you mean A100 40GB.*H100\? Write 100GB for memory\."):
        find_card("100")
    assert find_card("100GB").nominal_bytes == 100 * GIB


@pytest.mark.parametrize(
    ("name", "cards"),
    [
        ("a100", "A100 40GB, A100 80GB, A100 PCIe 80GB"),
        ("A100 PCIe", "A100 40GB, A100 PCIe 80GB"),
        ("RTX 4060 Ti", "RTX 4060 Ti 8GB, RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "RTX 3080 Laptop 8GB, RTX 3080 Laptop 16GB"),
        ("gh200", "GH200 96GB, GH200 144GB"),
    ],
)
def test_an_ambiguous_name_lists_its_cards(name: str, cards: str) -> None:
    with pytest.raises(BadInput, match=f"names more than one card; write one of {cards}$"):
        find_card(name)


@pytest.mark.parametrize("name", ["RTX 4071", "-8", "0", "x", "", "1e9", "nan", "8.0.0", "NVIDIA"])
def test_unknown_card(name: str) -> None:
    with pytest.raises(BadInput, match="card must be memory in GB above 0, such as 12, or a GPU's"):
        find_card(name)


def test_an_unknown_card_names_the_closest() -> None:
    with pytest.raises(BadInput, match="got 'RTX 4071'; the closest GPUs are RTX 4070"):
        find_card("RTX 4071")
    with pytest.raises(BadInput, match="the closest GPUs are H100, H100 PCIe, H100 NVL"):
        find_card("h100 96GB")


def test_the_maker_alone_lists_every_gpu() -> None:
    with pytest.raises(BadInput, match=f"the closest GPUs are {', '.join(GPUS)}$"):
        find_card("NVIDIA GeForce")


@given(
    st.one_of(st.text(), st.floats(), st.integers(), st.from_regex(r"[rR]?[tT]?[xX]? ?\d+ ?\w*"))
)
def test_any_input_gives_a_card_or_one_line(name: Any) -> None:
    message = ""
    try:
        assert find_card(name).nominal_bytes >= 0
    except BadInput as error:
        message = str(error)
    assert "\n" not in message
    gpu_of(str(name))


def memory(peak: int, **values: int) -> Memory:
    return Memory(peak_bytes=peak, method="predicted", **values)


def test_need_adds_memory_outside_torch() -> None:
    assert need_bytes(memory(GIB)) == tuple(GIB + outside for outside in OUTSIDE_TORCH_BYTES)
    assert (
        need_bytes(memory(GIB, min_reserved_bytes=2 * GIB))[0] == 2 * GIB + OUTSIDE_TORCH_BYTES[0]
    )
    measured = memory(GIB, reserved_bytes=2 * GIB, device_bytes=2 * GIB + 500 * MIB)
    assert outside_bytes(measured) == 500 * MIB
    assert need_bytes(measured) == (GIB + 500 * MIB, GIB + 500 * MIB)
    assert outside_bytes(memory(GIB)) is None


def test_fits_tight_and_does_not_fit() -> None:
    least, most = OUTSIDE_TORCH_BYTES
    card = find_card(8)
    assert card.usable_bytes == usable(8 * GIB) == int(8 * GIB * 0.967)
    assert fit_of(memory(card.usable_bytes - most), card.nominal_bytes) == "fits"
    assert fit_of(memory(card.usable_bytes - most + 1), card.nominal_bytes) == "tight"
    assert fit_of(memory(card.nominal_bytes - least), card.nominal_bytes) == "tight"
    assert fit_of(memory(card.nominal_bytes - least + 1), card.nominal_bytes) == "does not fit"


def test_needs_neither_torch_nor_pandas() -> None:
    code = "import sys, colqwen_lab.hardware; print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
