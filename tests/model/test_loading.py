"""Checkpoint folders in the published layout load unchanged, or an error names the problem."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import weakref
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen_lab.errors import BadInput, MissingRequirement
from colqwen_lab.model import checkpoint as checkpoints
from colqwen_lab.model import loading, quantize
from colqwen_lab.model.checkpoint import FolderCheckpoint, default_checkpoint
from colqwen_lab.model.config import SIZES, VARIANTS, resolve_variant
from colqwen_lab.model.inputs import encode_queries, read_tokenizer
from colqwen_lab.model.network import ColQwen3, ColQwen3Config

CPU = torch.device("cpu")
LAYER = "vlm.model.language_model.layers.1.mlp.up_proj"
IDS = torch.arange(7, 31).view(2, 12)
Edit = Callable[..., Path]


def load(folder: Path, **options: Any) -> loading.Loaded:
    return loading.load(FolderCheckpoint(folder), CPU, **options)


def embed(loaded: loading.Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(IDS).embeddings.float()


def test_base_folder_loads_as_it_is(base_folder: Path, tiny: loading.Loaded) -> None:
    loaded = load(base_folder)
    torch.testing.assert_close(embed(loaded), embed(tiny), rtol=0, atol=0)
    assert loaded.engaged == {"torch.nn.Linear": 28}
    assert loaded.dtype == "bfloat16"
    assert loaded.weights.startswith("folder:checkpoint#")
    rotary = loaded.model.get_buffer("vlm.model.language_model.rotary_emb.inv_freq")
    assert rotary.dtype == torch.float32
    expected = ColQwen3(ColQwen3Config.of_size("tiny")).vlm.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(rotary, expected)


@pytest.fixture
def sharded(base_folder: Path, tmp_path: Path) -> Path:
    """The folder in two shards; each holds a stale copy, of zeros, of a tensor of the other."""
    folder = tmp_path / "sharded"
    shutil.copytree(base_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        stale = next(name for name in names if name not in part)
        save_file(
            {name: tensors[name] for name in part} | {stale: torch.zeros_like(tensors[stale])},
            folder / file,
        )
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_index_says_which_shard_holds_a_tensor(sharded: Path, tiny: loading.Loaded) -> None:
    torch.testing.assert_close(embed(load(sharded)), embed(tiny), rtol=0, atol=0)


def reindexed(folder: Path, name: str, file: str) -> Path:
    """The folder with `file` as the shard of the tensor `name` in its index."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))
    return folder


def test_a_tensor_is_read_from_no_other_shard(sharded: Path) -> None:
    names = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    (other,) = set(names.values()) - {names[f"{LAYER}.weight"]}
    with pytest.raises(MissingRequirement, match=f"missing {LAYER}.weight$"):
        load(reindexed(sharded, f"{LAYER}.weight", other))


def test_an_index_that_does_not_name_the_single_file(sharded: Path, base_folder: Path) -> None:
    shutil.copy(base_folder / "model.safetensors", sharded)
    with pytest.raises(
        MissingRequirement, match=r"index.json does not name model.safetensors; remove one of them"
    ):
        load(sharded)


def test_an_index_names_files_of_the_folder(sharded: Path) -> None:
    with pytest.raises(MissingRequirement, match="points outside its folder"):
        load(reindexed(sharded, f"{LAYER}.weight", "../base/model.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["base", "auto_round", "auto_awq"])
def test_a_value_that_is_not_finite_is_named(
    format: str, value: float, base_folder: Path, packed: Callable[[str], Path], edited: Edit
) -> None:
    tensor = f"{LAYER}.weight" if format == "base" else f"{LAYER}.scales"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor][-1, -1] = value

    folder = edited(base_folder if format == "base" else packed(format), tensors=spoil)
    with pytest.raises(MissingRequirement, match=rf"edited: {tensor} must be finite, got values"):
        load(folder)


def test_a_value_beyond_the_dtype_is_named(base_folder: Path, edited: Edit) -> None:
    """It would become infinite in the cast."""
    folder = edited(base_folder, tensors=lambda t: t[f"{LAYER}.weight"].fill_(1e6))
    assert load(folder).dtype == "bfloat16"
    with pytest.raises(MissingRequirement, match=r"must be finite, got values .* in torch.float16"):
        load(folder, dtype="float16")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda text: text.replace(b"1e-06", b"1e-05")),
        ("tokenizer.json", lambda text: text + b"\n"),
        ("tokenizer.json", None),
        ("quantization_config.json", lambda text: text + b"\n"),
        ("quantization_config.json", None),
        ("model.safetensors", lambda text: text[:-1] + bytes([text[-1] ^ 1])),
    ],
)
def test_another_file_in_the_folder_is_another_model(
    name: str, change: Callable[[bytes], bytes] | None, base_folder: Path, edited: Edit
) -> None:
    """Rows kept by a resumed sweep are those of the same weights, by this label."""
    folder = edited(base_folder)
    without = FolderCheckpoint(folder).digest
    if name == "quantization_config.json":
        (folder / name).write_text("{}")
    first = FolderCheckpoint(folder)
    assert (first.digest == without) == (name != "quantization_config.json")
    copy = shutil.copytree(folder, folder.parent / "elsewhere" / folder.name)
    assert FolderCheckpoint(copy).label == first.label
    text = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        assert change(text) != text
        (folder / name).write_bytes(change(text))
    assert FolderCheckpoint(folder).label != first.label
    for stale in (first, pickle.loads(pickle.dumps(first))):  # here, and in a worker
        with pytest.raises(MissingRequirement, match="edited changed since it was opened"):
            loading.load(stale, CPU)


def test_half_precision_checkpoint_is_cast(
    base_folder: Path, edited: Edit, tiny: loading.Loaded
) -> None:
    folder = edited(base_folder, tensors=lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert load(folder).dtype == "bfloat16"
    assert load(folder, dtype="float16").dtype == "float16"


def test_the_8b_s_unused_head_is_recorded(base_folder: Path, edited: Edit) -> None:
    folder = edited(
        base_folder, tensors=lambda t: t.update({"vlm.lm_head.weight": torch.zeros(1536, 128)})
    )
    assert load(folder).unused == ("vlm.lm_head.weight",)


@pytest.mark.parametrize("format", ["auto_round", "auto_gptq", "auto_awq"])
def test_every_packing_loads_onto_a_real_kernel(format: str, packed: Callable[[str], Path]) -> None:
    folder = packed(format)
    loaded = load(folder)
    (kernel,) = loaded.engaged
    assert loaded.engaged == {kernel: 28}
    assert kernel in ("auto_round:torch_zp", "auto_round_kernel_zp", "auto_round_kernel_awq")
    assert loaded.kept_16bit == {"vision encoder": 24, "head": 1}
    reference = embed(load(packed("auto_round"), kernel="torch"))
    assert torch.cosine_similarity(embed(loaded), reference, dim=-1).min() > 0.999


def test_awq_checkpoint_is_the_same_codes_in_another_packing(packed: Callable[[str], Path]) -> None:
    assert (
        json.loads((packed("auto_awq") / "config.json").read_text())["quantization_config"][
            "quant_method"
        ]
        == "awq"
    )
    assert load_file(packed("auto_awq") / "model.safetensors")[f"{LAYER}.qweight"].shape == (
        128,
        32,
    )
    assert load_file(packed("auto_gptq") / "model.safetensors")[f"{LAYER}.qweight"].shape == (
        16,
        256,
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{LAYER}.weight"), f"missing {LAYER}.weight"),
        (lambda t: t.pop("embedding_proj_layer.bias"), "missing embedding_proj_layer.bias"),
        (lambda t: t.update({"vlm.extra": torch.zeros(2)}), "unexpected vlm.extra"),
        (
            lambda t: t.update({"vlm\nx\x1b[2J" + "y" * 10**5: torch.zeros(2)}),
            r"unexpected vlm x\[2Jy{50,300}$",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(256, 64)}),
            rf"{LAYER}.weight must have shape \[256, 128\], got \[256, 64\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(256, 128, dtype=torch.int32)}),
            "must be one of BF16, F16, F32, got I32",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(256, 128).double()}),
            "must be one of BF16, F16, F32, got F64",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    base_folder: Path, edited: Edit, change: Any, says: str
) -> None:
    with pytest.raises(MissingRequirement, match=says):
        load(edited(base_folder, tensors=change))


def test_many_problems_are_counted(base_folder: Path, edited: Edit) -> None:
    with pytest.raises(MissingRequirement, match=r"missing .* and \d+ more"):
        load(edited(base_folder, tensors=lambda t: [t.pop(name) for name in list(t)[:20]]))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_file_is_named(base_folder: Path, edited: Edit, keep: int) -> None:
    folder = edited(base_folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        MissingRequirement, match=r"model\.safetensors is missing, truncated or not safetensors"
    ):
        load(folder)


def test_links_out_of_the_folder_are_errors_except_to_the_hub_s_blobs(
    base_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    for directory in (folder, blobs):
        directory.mkdir(parents=True)
    for number, file in enumerate(sorted(base_folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (folder / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load(folder).engaged
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        link = (folder / name).readlink()
        (folder / name).unlink()
        (folder / name).symlink_to(base_folder / name)
        with pytest.raises(MissingRequirement, match=f"{name} points outside its folder"):
            load(folder)
        (folder / name).unlink()
        (folder / name).symlink_to(link)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("text_config", {"num_hidden_layers": 10**12}, r"its files .* do not hold a network"),
        ("text_config", {"intermediate_size": 10**9}, r"its files .* do not hold a network"),
        ("vision_config", {"intermediate_size": 10**9}, r"its files .* do not hold a network"),
        ("text_config", {"head_dim": 0}, "is not the configuration of a ColQwen3"),
    ],
)
def test_no_memory_is_reserved_for_what_the_files_do_not_hold(
    base_folder: Path, edited: Edit, part: str, change: dict[str, int], says: str
) -> None:
    with pytest.raises(MissingRequirement, match=says):
        load(edited(base_folder, config=lambda c: c[part].update(change)))


def test_a_header_that_claims_too_much_is_named(base_folder: Path, edited: Edit) -> None:
    folder = edited(base_folder)
    file = folder / "model.safetensors"
    file.write_bytes((10**15).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(
        MissingRequirement, match=r"model\.safetensors is missing, truncated or not safetensors"
    ):
        load(folder)
    with (folder / "tokenizer.json").open("ab") as grown:
        grown.truncate(checkpoints.TOKENIZER_BYTES + 1)
    file.write_bytes((base_folder / file.name).read_bytes())
    with pytest.raises(
        MissingRequirement, match=r"tokenizer\.json must have at most \d+ bytes, got"
    ):
        load(folder)
    (folder / "config.json").write_bytes(b" " * (checkpoints.JSON_BYTES + 1))
    with pytest.raises(MissingRequirement, match=r"config\.json must have at most \d+ bytes, got"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]
)
def test_only_files_are_read(name: str, base_folder: Path, edited: Edit) -> None:
    """A pipe would be waited for."""
    folder = edited(base_folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(MissingRequirement, match=f"{name} is not a file"):
        load(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(MissingRequirement, match=name):
            load(folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "", "a\nb"])
def test_an_index_names_files(name: str, base_folder: Path, edited: Edit) -> None:
    folder = edited(base_folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(MissingRequirement, match=r"^.{,400}$"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (
            {
                "padding": {
                    "strategy": {"Fixed": 20_000_000},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                }
            },
            True,
        ),
        (
            {
                "truncation": {
                    "max_length": 1,
                    "stride": 0,
                    "strategy": "LongestFirst",
                    "direction": "Right",
                }
            },
            True,
        ),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}}, False),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, False),
        ({"normalizer": None}, True),
    ],
)
def test_a_tokenizer_neither_pads_nor_cuts_nor_rewrites(
    change: dict[str, Any], taken: bool, base_folder: Path, edited: Edit
) -> None:
    folder = edited(base_folder)
    own = json.loads((folder / "tokenizer.json").read_text())
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"} if "padding" in change else {}
    changed = own | {key: value and value | pad for key, value in change.items()}
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    if taken:
        tokenizer, plain = (
            read_tokenizer(path / "tokenizer.json") for path in (folder, base_folder)
        )
        assert encode_queries(tokenizer, ["where is the tree?"]) == encode_queries(
            plain, ["where is the tree?"]
        )
    else:
        with pytest.raises(
            MissingRequirement, match=r"normalizer must be as in Qwen's tokenizer, got"
        ):
            load(folder)


def test_pickled_weights_are_never_read(base_folder: Path, edited: Edit) -> None:
    folder = edited(base_folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingRequirement, match=r"model\.safetensors is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: c.update(model_type="qwen3_vl"),
            "model_type must be 'colqwen3', got 'qwen3_vl'",
        ),
        (
            lambda c: c.update(model_type="x" * 10**6),
            "^.{,300}model_type must be 'colqwen3', got 'x{,100}$",
        ),
        (
            lambda c: c["vision_config"].update(deepstack_visual_indexes=[0] * 80_000),
            r"its files .* do not hold a network",
        ),
        (
            lambda c: c["vision_config"].update(deepstack_visual_indexes=list(range(80_000))),
            r"its files .* do not hold a network",
        ),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act must be 'silu', got 'g"),
        (lambda c: c["text_config"].update(attention_bias=True), "attention_bias must be False"),
        (lambda c: c["vision_config"].update(patch_size=14), "patch_size must be 16, got 14"),
        (lambda c: c["text_config"].update(rms_norm_eps=float("nan")), "numbers must be finite"),
        (lambda c: c["text_config"].update(rope_theta=-1), "a positive rope_theta"),
        (lambda c: c["text_config"]["rope_scaling"].update(rope_type="yarn"), "rope_type default"),
        (lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[6, 5]), "mrope_section"),
        (lambda c: c.update(image_token_id=10**9), "image_token_id must be below 1536, got 10"),
        (
            lambda c: c["text_config"].update(hidden_size="wide"),
            "not the configuration of a ColQwen3",
        ),
        (
            lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "bits": 4}),
            r'quantization_config.quant_method must be "auto-round", "gptq" or "awq", got \'bits',
        ),
    ],
)
def test_a_wrong_configuration_is_an_error(
    base_folder: Path, edited: Edit, change: Any, says: str
) -> None:
    with pytest.raises(MissingRequirement, match=says):
        load(edited(base_folder, config=change))


def test_not_a_checkpoint_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingRequirement, match=r"has no config\.json"):
        FolderCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(MissingRequirement, match="cannot be read"):
        FolderCheckpoint(tmp_path)


def test_blocks_that_match_nothing_are_an_error(
    packed: Callable[[str], Path], edited: Edit
) -> None:
    """AutoRound would go on with new random 16-bit linears."""
    folder = edited(
        packed("auto_round"),
        config=lambda c: c["quantization_config"].update(block_name_to_quantize="model.layers"),
    )
    with pytest.raises(MissingRequirement, match="matches no layer"):
        load(folder)


def test_a_packing_that_no_kernel_serves_is_an_error(packed: Callable[[str], Path]) -> None:
    """AutoRound would choose its fake kernel, or end the process."""
    with pytest.raises(
        MissingRequirement,
        match=r"kernel torch cannot load bits 4, .* on cpu.*no installed .* auto_round:auto_awq",
    ):
        load(packed("auto_awq"), kernel="torch")


def test_asymmetric_codes_have_no_fallback(packed: Callable[[str], Path], edited: Edit) -> None:
    folder = edited(
        packed("auto_round"), config=lambda c: c["quantization_config"].update(sym=False)
    )
    with pytest.raises(
        MissingRequirement,
        match=r"kernel torch cannot load .* no installed kernel runs packing auto_round:auto_",
    ):
        load(folder, kernel="torch")


def zeros(word: int) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda t: [value.fill_(word) for name, value in t.items() if name.endswith("qzeros")]


@pytest.mark.parametrize(
    ("format", "other"),
    [("auto_round", 0x88888888), ("auto_gptq", 0x77777776), ("auto_awq", 0x77777777)],
)
def test_zero_points_of_symmetric_codes_must_be_the_middle(
    format: str, other: int, packed: Callable[[str], Path], edited: Edit
) -> None:
    """The middle is 8; GPTQ's packing stores 7 for it, AWQ's 8.

    Kernels for symmetric codes do not read zero points: such a checkpoint would load wrongly.
    """
    word = other - 2**32 if other >= 2**31 else other
    with pytest.raises(MissingRequirement, match=r"qzeros holds zero points other than the middle"):
        load(edited(packed(format), tensors=zeros(word)))


def test_zero_points_of_three_bits_cross_words(tmp_path: Path, edited: Edit) -> None:
    source = default_checkpoint(VARIANTS["base"], "tiny", "auto", CPU)
    recipe = quantize.Recipe("W3A16", iters=0, samples=4, seqlen=16)
    quantize.quantize(source, tmp_path / "w3", recipe)
    assert load(tmp_path / "w3").engaged == {"auto_round:torch_zp": 28}
    with pytest.raises(MissingRequirement, match=r"qzeros holds zero points other than the middle"):
        load(edited(tmp_path / "w3", tensors=zeros(0x1B6DB6DB)))


def test_autoawq_s_zero_point_is_asymmetric(packed: Callable[[str], Path], edited: Edit) -> None:
    def autoawq(config: dict[str, Any]) -> None:
        del config["quantization_config"]["sym"]
        config["quantization_config"]["zero_point"] = True

    shifted = load(edited(packed("auto_awq"), tensors=zeros(0x33333333), config=autoawq))
    plain = load(packed("auto_awq"))
    assert torch.cosine_similarity(embed(shifted), embed(plain), dim=-1).mean() < 0.9, (
        "the zeros count"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(desc_act=True),
        lambda q: q.update(checkpoint_format="gptq_v2"),
        lambda q: q.update(bits="four"),
        lambda q: q.update(quant_method=None),
        lambda q: q.update(
            bits="x", packing_format="auto_round:auto_gptq", quant_method="auto-round"
        ),
        lambda q: q.update(extra_config={"(": {"bits": 16}}),
        lambda q: q.update(extra_config={"(a+)+$": {"bits": 16}}),
        lambda q: q.update(extra_config={"a.*b.*c.*d.*": {"bits": 16}}),
        lambda q: q.update(extra_config={f"layer{number}": {} for number in range(3000)}),
        lambda q: q.update(extra_config={LAYER: [1]}),
        lambda q: q.update(extra_config=[1]),
        lambda q: q.update(dynamic={"-:(a+)+$": {}}),
        lambda q: q.update(block_name_to_quantize=5),
        lambda q: q.update(modules_to_not_convert=5),
        lambda q: q.update(modules_to_not_convert=["(a+)+$"]),
        lambda q: q.update(modules_in_block_to_quantize=[["(a+)+$"]]),
    ],
)
def test_a_quantisation_that_cannot_be_loaded_is_one_line(
    packed: Callable[[str], Path], edited: Edit, change: Any
) -> None:
    with pytest.raises(MissingRequirement) as caught:
        load(edited(packed("auto_gptq"), config=lambda c: change(c["quantization_config"])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("extra_config", {LAYER: {"bits": 16}}),
        ("dynamic", {r"-:.*layers\.1\.mlp\.up_proj$": {}}),
        ("modules_to_not_convert", ["layers.1.mlp.up_proj"]),
    ],
)
def test_layers_that_a_quantisation_keeps_are_kept(
    key: str, value: Any, packed: Callable[[str], Path], edited: Edit
) -> None:
    """By name, and by the patterns that GPTQ and AWQ checkpoints hold."""
    parts = [f"{LAYER}.{part}" for part in ("qweight", "scales", "qzeros", "g_idx")]

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for part in parts:
            tensors.pop(part, None)
        tensors[f"{LAYER}.weight"] = torch.zeros(256, 128)

    folder = edited(
        packed("auto_gptq"),
        tensors=unpack,
        config=lambda c: c["quantization_config"].update({key: value}),
    )
    assert load(folder, kernel="torch").engaged["torch.nn.Linear"] == 1


def test_quantization_config_must_be_an_object(packed: Callable[[str], Path], edited: Edit) -> None:
    with pytest.raises(MissingRequirement, match="quantization_config must be an object"):
        load(edited(packed("auto_gptq"), config=lambda c: c.update(quantization_config="x")))


@pytest.mark.parametrize(
    ("format", "changes", "says"),
    [
        ("auto_gptq", {"bits": "4"}, "bits must be 2, 3, 4 or 8, got '4'"),
        ("auto_gptq", {"bits": None}, "bits must be 2, 3, 4 or 8, got None"),
        ("auto_gptq", {"group_size": "128"}, "group_size must be -1, 16, .* or 2048, got '128'"),
        ("auto_gptq", {"group_size": 100}, "group_size must be -1, 16, .* or 2048, got 100"),
        ("auto_gptq", {"sym": "false"}, "sym must be absent, true or false, got 'false'"),
        ("auto_gptq", {"desc_act": True}, "desc_act must be absent or false, got True"),
        ("auto_gptq", {"checkpoint_format": "gptq_v2"}, 'must be absent or "gptq", got .gptq_v2'),
        ("auto_gptq", {"act_bits": 8}, "act_bits must be absent, 16 or 32, got 8"),
        ("auto_awq", {"version": "GEMV"}, 'version must be absent, "gemm" or "GEMM", got .GEMV'),
        ("auto_round", {"packing_format": "x"}, 'packing_format must be absent, "auto", .*got .x'),
        ("auto_round", {"rotation_config": {}}, "rotation_config must be absent, got {}"),
        ("auto_round", {"extra_config": {LAYER: {"bits": 8}}}, "keep layers at 16 bits or in the"),
        ("auto_round", {"extra_config": {LAYER: {"sym": False}}}, "keep layers at 16 bits or in"),
    ],
)
def test_a_quantization_config_says_what_its_fields_may_hold(
    format: str, changes: Any, says: str, packed: Callable[[str], Path], edited: Edit
) -> None:
    folder = edited(packed(format), config=lambda c: c["quantization_config"].update(changes))
    with pytest.raises(MissingRequirement, match=rf"config\.json .*quantization_config\..*{says}"):
        FolderCheckpoint(folder)


def test_usual_spellings_of_a_quantization_config_are_read(
    packed: Callable[[str], Path], edited: Edit
) -> None:
    changes = {"version": "GEMM", "bits": 4.0, "provider": "x", "sym": None}
    folder = edited(packed("auto_awq"), config=lambda c: c["quantization_config"].update(changes))
    assert load(folder).engaged == load(packed("auto_awq")).engaged
    assert (
        FolderCheckpoint(folder).quantization == FolderCheckpoint(packed("auto_awq")).quantization
    )


def test_group_size_minus_one_is_one_group_of_all_inputs(
    packed: Callable[[str], Path], edited: Edit
) -> None:
    """Layers of 128 inputs have one group as it is; those of 256 keep 16 bits here."""
    wide = [f"vlm.model.language_model.layers.{layer}.mlp.down_proj" for layer in range(4)]

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for layer in wide:
            for part in ("qweight", "scales", "qzeros"):
                del tensors[f"{layer}.{part}"]
            tensors[f"{layer}.weight"] = torch.zeros(128, 256)

    def config(values: dict[str, Any]) -> None:
        kept = {"extra_config": {layer: {"bits": 16} for layer in wide}}
        values["quantization_config"].update(kept)

    grouped = edited(packed("auto_round"), tensors=keep, config=config)
    expected = embed(load(grouped, kernel="torch"))
    values = json.loads((grouped / "config.json").read_text())
    values["quantization_config"]["group_size"] = -1
    (grouped / "config.json").write_text(json.dumps(values))
    torch.testing.assert_close(embed(load(grouped, kernel="torch")), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("", "num_labels", 10**9),
        ("text_config", "num_labels", 10**9),
        ("vision_config", "num_labels", 10**9),
        ("", "attn_implementation", "eager"),
        ("text_config", "attn_implementation", "eager"),
        ("vision_config", "_attn_implementation", "eager"),
        ("", "output_hidden_states", True),
        ("", "return_dict", False),
        ("quantization_config", "quant_block_list", ["(a+)+$"]),
        ("quantization_config", "to_quant_block_names", ["(a+)+$"]),
    ],
)
def test_an_entry_that_the_network_does_not_have_is_not_read(
    part: str, key: str, value: Any, packed: Callable[[str], Path], edited: Edit
) -> None:
    """A count makes a list of labels; another attention would run than the row says."""

    def change(config: dict[str, Any]) -> None:
        (config[part] if part else config)[key] = value

    loaded = load(edited(packed("auto_round"), config=change), kernel="torch")
    for config in (loaded.model.config, loaded.model.config.text_config):
        assert config._attn_implementation == "sdpa"
    assert loaded.model.config.num_labels == 2
    torch.testing.assert_close(
        embed(loaded), embed(load(packed("auto_round"), kernel="torch")), rtol=0, atol=0
    )


def test_the_checkpoint_s_configuration_stays_its_own(packed: Callable[[str], Path]) -> None:
    checkpoint = FolderCheckpoint(packed("auto_round"))
    loading.load(checkpoint, CPU, "torch")
    assert not hasattr(checkpoint.config, "quantization_config")


def test_the_fake_kernel_is_an_error_by_name_and_on_the_module(
    packed: Callable[[str], Path],
) -> None:
    with pytest.raises(BadInput, match=r"kernel must be auto, .*, got 'auto_round:fake'"):
        load(packed("auto_round"), kernel="auto_round:fake")
    loaded = load(packed("auto_round"), kernel="torch")
    from auto_round.experimental.qmodules import FakeActQuantLinear

    layer = loaded.model.get_submodule(LAYER)
    original = torch.nn.Linear(128, 256, bias=False)
    scheme = {"bits": 4, "group_size": 128, "sym": True, "act_bits": 16, "data_type": "int"}
    from auto_round.schemes import QuantizationScheme

    fake = FakeActQuantLinear.from_original(QuantizationScheme.from_dict(scheme), original)
    loaded.model.set_submodule(LAYER, fake)
    with pytest.raises(MissingRequirement, match="fake kernel"):
        loading.kernels_used(loaded.model, ["auto_round:torch_zp"])
    loaded.model.set_submodule(LAYER, layer)


def test_engaged_is_read_off_the_modules(packed: Callable[[str], Path]) -> None:
    loaded = load(packed("auto_round"), kernel="torch")
    loaded.model.set_submodule(LAYER, torch.nn.Linear(128, 256, bias=False))
    assert loading.kernels_used(loaded.model, ["auto_round:torch_zp"]) == {
        "auto_round:torch_zp": 27,
        "torch.nn.Linear": 1,
    }


def test_a_kernel_that_cannot_multiply_a_shape_is_not_chosen(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As humming on Hopper, which takes no width of 64; asked for, it is one line."""
    ark = pytest.importorskip("auto_round_kernel.qlinear").QuantLinearGPTQ
    forward = ark.forward

    def narrow(layer: Any, x: torch.Tensor) -> torch.Tensor:
        if layer.outfeatures == 64:
            raise AssertionError("block_shape_n is too small")
        return forward(layer, x)

    monkeypatch.setattr(ark, "forward", narrow)
    assert load(packed("auto_round")).engaged == {"auto_round:torch_zp": 28}
    with pytest.raises(
        MissingRequirement,
        match=r"^kernel auto_round_kernel_zp cannot multiply 128 x 64: AssertionError block_shape"
        "_n is too small; use kernel auto$",
    ):
        load(packed("auto_round"), kernel="ark")


def test_a_reordered_group_index_is_not_ignored(
    packed: Callable[[str], Path], edited: Edit
) -> None:
    folder = edited(
        packed("auto_gptq"),
        tensors=lambda t: t.update({f"{LAYER}.g_idx": t[f"{LAYER}.g_idx"].flip(0) + 1}),
    )
    with pytest.raises(MissingRequirement, match=f"unexpected {LAYER}.g_idx"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "config"),
    [
        (torch.tensor(3), {}),
        (torch.zeros(128, dtype=torch.int32), {"group_size": None}),
        (torch.zeros(128, dtype=torch.int32), {"group_size": 0}),
        (torch.zeros(128, 1, dtype=torch.int32), {}),
    ],
)
def test_an_odd_group_index_is_unexpected(
    index: torch.Tensor, config: dict[str, Any], packed: Callable[[str], Path], edited: Edit
) -> None:
    folder = edited(
        packed("auto_gptq"),
        tensors=lambda t: t.update({f"{LAYER}.g_idx": index}),
        config=lambda c: c["quantization_config"].update(config),
    )
    with pytest.raises(MissingRequirement, match=r"unexpected .*g_idx|group_size must be -1, 16"):
        load(folder)


@pytest.mark.parametrize("kernel", ["nope", "marlin"])
def test_an_unknown_kernel_names_the_valid_ones(kernel: str, packed: Callable[[str], Path]) -> None:
    with pytest.raises(
        BadInput, match=rf"kernel must be auto, .*torch, torch_zp on cpu, got '{kernel}'"
    ):
        load(packed("auto_round"), kernel=kernel)


def test_kernel_for_16_bit_weights(base_folder: Path) -> None:
    with pytest.raises(
        BadInput, match="kernel must be auto or torch for 16-bit weights, got 'ark'"
    ):
        load(base_folder, kernel="ark")
    with pytest.raises(BadInput, match=r"dtype.*bfloat16.*float32"):
        load(base_folder, dtype="int4")


@pytest.mark.parametrize("scheme", [None, "W4A16", "W8A16", "W3A16G32", "W2A16G64"])
def test_random_weights_run_and_depend_on_the_seed_alone(scheme: str | None) -> None:
    variant = resolve_variant(scheme or "base")
    first, again, other = (
        loading.load(default_checkpoint(variant, "tiny", "random", CPU, seed), CPU, kernel="torch")
        for seed in (1, 1, 2)
    )
    torch.testing.assert_close(embed(first), embed(again), rtol=0, atol=0)
    assert not torch.allclose(embed(first), embed(other), atol=1e-2)
    torch.testing.assert_close(embed(first).norm(dim=-1), torch.ones(2, 12), atol=0.01, rtol=0)
    for name, parameter in first.model.state_dict().items():
        assert parameter.isfinite().all(), name


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("W4A16", "8a244d846dc4954e"),
        ("W3A16G32", "a1ca69c8332eec44"),
        ("W2A16G64", "90f031b0037729fb"),
        ("W8A16", "b86080afae88f461"),
    ],
)
def test_random_codes_are_the_recorded_ones(scheme: str, expected: str) -> None:
    checkpoint = default_checkpoint(resolve_variant(scheme), "tiny", "random", CPU, 3)
    model, _ = loading.skeleton(checkpoint.config, checkpoint.quantization, CPU, "torch")
    state = sha256()
    for name, like in model.state_dict().items():
        if name.endswith(("qweight", "qzeros", "scales")):
            values = checkpoint.read(name, like, CPU)
            state.update((name + str(values.dtype) + str(tuple(values.shape))).encode())
            state.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    assert state.hexdigest()[:16] == expected
    head = checkpoint.read("embedding_proj_layer.weight", torch.empty(320, 128), CPU)
    torch.testing.assert_close(
        default_checkpoint(VARIANTS["base"], "tiny", "random", CPU).read(
            "embedding_proj_layer.weight", head, CPU
        )[0, :4],
        torch.tensor([0.02523618, -0.01508156, 0.00729021, -0.01691708]),
    )


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W4A16", "W8A16"])
def test_random_codes_dequantise_to_the_spread_of_random_weights(scheme: str) -> None:
    """And to their mean, zero: else a deep network turns every token the same way."""
    loaded = loading.load(
        default_checkpoint(resolve_variant(scheme), "tiny", "random", CPU), CPU, kernel="torch"
    )
    weight = quantize.dequantized(loaded.model.get_submodule(LAYER), 128, CPU).float()
    assert weight.shape == (256, 128)
    assert weight.std() == pytest.approx(0.02, rel=0.03)
    assert abs(weight.mean()) < 0.02 * 4 / weight.numel() ** 0.5


def test_4b_skeleton_counts_the_published_bytes() -> None:
    """3,336.2 MiB with packed zeros of 13.6 MiB more; source: the project's facts."""
    checkpoint = default_checkpoint(VARIANTS["awq"], "4b", "random", CPU)
    model, used = loading.skeleton(checkpoint.config, checkpoint.quantization, CPU, kernel="torch")
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    packed_bytes = sum(
        size for name, size in sizes.items() if name.rsplit(".", 1)[-1] in ("qweight", "scales")
    )
    zeros = sum(size for name, size in sizes.items() if name.endswith("qzeros"))
    assert packed_bytes / 2**20 == pytest.approx(1786.6, abs=0.05)
    assert (packed_bytes + zeros) / 2**20 == pytest.approx(1800.2, abs=0.05)
    assert (sum(sizes.values()) - zeros) / 2**20 == pytest.approx(1536.0 + 1786.6, abs=0.1)
    assert used == ["auto_round:torch_zp"]


def test_no_network_says_what_to_do() -> None:
    with pytest.raises(
        MissingRequirement,
        match=r"hf download TomoroAI/tomoro-colqwen3-embed-4b --revision 6a32fb.*--weights random",
    ):
        default_checkpoint(VARIANTS["base"], "4b", "auto", CPU)
    with pytest.raises(MissingRequirement, match="no hub repository is known for awq at size tiny"):
        default_checkpoint(VARIANTS["awq"], "tiny", "hub", CPU)


def test_hub_revision_is_recorded(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pinned commit and a branch, both from the hub's cache without a network."""
    from huggingface_hub import constants

    from colqwen_lab.model.checkpoint import Repository, hub_folder

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    pinned, branch = VARIANTS["base"].hub["4b"], Repository("someone/else")
    cached = tmp_path / "models--someone--else"
    shutil.copytree(base_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert hub_folder(branch).name == "0" * 40
    shutil.copytree(
        base_folder,
        tmp_path / "models--TomoroAI--tomoro-colqwen3-embed-4b/snapshots" / pinned.revision,
    )
    checkpoint = default_checkpoint(VARIANTS["base"], "4b", "hub", CPU)
    assert checkpoint.label == f"hub:{pinned.name}@{pinned.revision}"
    assert checkpoint.size == "tiny"


@pytest.mark.parametrize(
    "places",
    [
        {"rope_theta": 7e6, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 7e6}},
        {"rope_parameters": {"rope_theta": 7e6}, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 7e6}, "rope_scaling": {}, "rope_theta": 1e4},
    ],
)
def test_rotary_parameters_are_read_from_either_place(places: dict[str, Any]) -> None:
    """The newer place wins; transformers would take the older one, or its own default."""
    sections = {"mrope_section": [6, 5, 5]}
    own = {name: v | sections if isinstance(v, dict) else v for name, v in places.items()}
    text = {**SIZES["tiny"]["text_config"], "rope_parameters": None} | own
    config = checkpoints.read_config({**SIZES["tiny"], "text_config": text})
    assert config.text_config.rope_parameters["rope_theta"] == 7e6


def test_size_is_told_from_the_configuration(base_folder: Path, edited: Edit) -> None:
    assert FolderCheckpoint(base_folder).size == "tiny"
    for name, value in (("num_hidden_layers", 3), ("num_key_value_heads", 1)):
        folder = edited(
            base_folder, config=lambda c, n=name, v=value: c["text_config"].update({n: v})
        )
        assert FolderCheckpoint(folder).size == "custom"
        shutil.rmtree(folder)
    assert {
        default_checkpoint(VARIANTS["base"], size, "random", CPU).size for size in SIZES
    } == set(SIZES)


class _Counted:
    """A file of tensors that counts the bytes of those it gave and that still live."""

    def __init__(self, file: Any) -> None:
        self.file, self.live, self.most = file, 0, 0
        self.get_slice = file.get_slice

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self.file.get_tensor(name).clone()
        self.live += tensor.nbytes
        self.most = max(self.most, self.live)
        weakref.finalize(tensor.untyped_storage(), self._gone, tensor.nbytes)
        return tensor

    def _gone(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize("format", ["base", "auto_round"])
def test_loading_streams_to_the_device(
    format: str, base_folder: Path, packed: Callable[[str], Path]
) -> None:
    """With a device that is not the host, the host holds one tensor at a time."""
    checkpoint = FolderCheckpoint(base_folder if format == "base" else packed(format))
    (file,) = set(checkpoint.files.values())
    counted = _Counted(file)
    checkpoint.files = dict.fromkeys(checkpoint.files, counted)  # type: ignore[arg-type]
    meta = torch.device("meta")
    model, _ = loading.skeleton(
        checkpoint.config,
        checkpoint.quantization,
        CPU,
        "torch" if checkpoint.quantization else "auto",
    )
    loading.fill(model, checkpoint, meta)
    assert counted.most == max(like.nbytes for like in model.state_dict().values())
    assert counted.live == 0
