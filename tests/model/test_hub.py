"""Checkpoints from the hub, by the real client, from a server of the hub's protocol here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save

from colqwen_lab.errors import MissingRequirement
from colqwen_lab.model import loading
from colqwen_lab.model.checkpoint import Checkpoint, default_checkpoint
from colqwen_lab.model.config import Repository, Variant
from tests.model.hub_server import Hub, Repo, serving

CPU = torch.device("cpu")
NAME, A, B = "owner/sharded", "a" * 40, "b" * 40
SHARDS = ("model-1.safetensors", "model-2.safetensors")
Open = Callable[..., Checkpoint]


@pytest.fixture
def hub(base_folder: Path) -> Hub:
    """A repository of two shards; commit B has another tokenizer."""
    tensors, files = load_file(base_folder / "model.safetensors"), dict[str, bytes]()
    for name in ("config.json", "tokenizer.json"):
        files[name] = (base_folder / name).read_bytes()
    places = {tensor: SHARDS[number % 2] for number, tensor in enumerate(sorted(tensors))}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    for shard in SHARDS:
        files[shard] = save({name: tensors[name] for name in tensors if places[name] == shard})
    files["README.md"] = b"not wanted"
    moved = files | {"tokenizer.json": files["tokenizer.json"] + b"\n"}
    return Hub({NAME: Repo({A: files, B: moved}, {"main": A})})


@pytest.fixture
def download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens the checkpoint of a repository on the server, with an empty cache at first."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waits = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr(file_download, "time", waits)
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

        def open_(name: str = NAME, revision: str = "main") -> Checkpoint:
            variant = Variant("v", "", hub={"any": Repository(name, revision)})
            return default_checkpoint(variant, "tiny", "auto", CPU)

        yield open_


@pytest.mark.parametrize("revision", ["main", A])
def test_the_record_names_the_commit(revision: str, download: Open, hub: Hub) -> None:
    checkpoint = download(revision=revision)
    assert checkpoint.label == f"hub:{NAME}@{A}"
    assert loading.load(checkpoint, CPU).weights == checkpoint.label
    assert not any("README" in path for path in hub.requests)


def test_a_revision_that_moved_is_another_model(download: Open, hub: Hub) -> None:
    assert download().label == f"hub:{NAME}@{A}"
    hub.repos[NAME].revisions["main"] = B
    assert download().label == f"hub:{NAME}@{B}"
    assert hub.starts.count((SHARDS[0], 0)) == 1, "the same shards are not loaded again"


def test_a_cached_commit_needs_no_network(download: Open, hub: Hub) -> None:
    assert download().label == f"hub:{NAME}@{A}"
    hub.repos[NAME].status = 401
    assert download().label == download(revision=A).label == f"hub:{NAME}@{A}"


def test_a_partial_download_is_resumed(
    download: Open, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.repos[NAME].drops[SHARDS[0]] = [50_000, 50_000]
    assert loading.load(download(), CPU).engaged
    starts = [start for file, start in hub.starts if file == SHARDS[0]]
    assert starts == [0, 50_000, 100_000]


def test_a_lost_connection_is_one_line_and_the_next_run_goes_on(download: Open, hub: Hub) -> None:
    hub.repos[NAME].drops[SHARDS[0]] = [0] * 6
    reason = "RemoteProtocolError: peer closed connection"
    with pytest.raises(MissingRequirement, match=f"^cannot get {NAME}.*{reason}") as caught:
        download()
    assert f"`hf download {NAME}` with a network (finished files are kept)" in str(caught.value)
    assert loading.load(download(), CPU).weights == f"hub:{NAME}@{A}"
    assert hub.starts.count((SHARDS[1], 0)) == 1


def test_an_incomplete_snapshot_is_not_loaded(download: Open, hub: Hub) -> None:
    hub.repos[NAME].drops[SHARDS[0]] = [0] * 6
    with pytest.raises(MissingRequirement, match="RemoteProtocolError"):
        download()
    hub.repos[NAME].status = 500
    with pytest.raises(MissingRequirement, match=r"500 Internal Server Error.*hf download"):
        download()


@pytest.mark.parametrize(
    ("name", "revision", "status", "says"),
    [
        ("owner/none", "main", 200, "revision main.*none of this name.*`hf auth login`"),
        (NAME, "main", 401, "its owner grants access; ask on its page, then `hf auth login`"),
        (NAME, "nope", 200, "revision nope.*there is no such revision"),
        (NAME, "c" * 40, 200, "revision cccc.*there is no such revision"),
        (NAME, "main", 500, "500 Internal Server Error.*hf download .*`--weights random`"),
    ],
)
def test_each_failure_is_one_line(
    name: str, revision: str, status: int, says: str, download: Open, hub: Hub
) -> None:
    hub.repos[NAME].status = status
    with pytest.raises(MissingRequirement, match=f"^cannot get {name}, .*{says}") as caught:
        download(name, revision)
    assert "\n" not in str(caught.value)
