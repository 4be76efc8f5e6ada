"""Images out of timm's dataset factory, against the same images in a folder."""

from __future__ import annotations

import gc
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import tpvprune as tp
from tpvprune.inputs import Inputs
from tpvprune.recipe import validate_recipe
from tpvprune.zoo import streams
from tpvprune.zoo.data import open_pool, source_state
from tpvprune.zoo.models import create_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return create_model("cifar_resnet20")


def pictures(count: int = 12) -> list[tuple[str, Image.Image]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
        made.append((f"{'ab'[i % 2]}/{i:03d}.png", Image.fromarray(pixels)))
    return sorted(made)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, image in pictures():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "folder" / name)
    return tmp_path / "folder"


def everything(pool: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*pool.loader(5, **how), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's readers close nothing
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_tar_file_gives_what_its_folder_gives(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, arcname=".")
    wanted, _ = everything(open_pool(folder, model))
    for labels in (None, "own"):
        pool = open_pool(tmp_path / "images.tar", model, labels=labels)
        images, found = everything(pool)
        assert torch.equal(images, wanted)
        assert found.tolist() == ([-1] * 12 if labels is None else [0] * 6 + [1] * 6)
    one, other = pool.split()
    assert torch.equal(everything(one)[0], wanted[::2])
    assert torch.equal(everything(other)[0], wanted[1::2])
    del pool, one, other
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_labels_of_a_tar_file_are_those_of_its_folder(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, arcname=".")
    names = sorted(path.name for path in folder.iterdir())
    classes = [f"other{n}" for n in range(8)]
    classes[3:3], classes[7:7] = [names[1]], [names[0]]
    (tmp_path / "map.txt").write_text("\n".join(classes))
    wanted = everything(open_pool(folder, model, labels=tmp_path / "map.txt"))[1]
    assert set(wanted.tolist()) == {3, 7}
    found = everything(open_pool(tmp_path / "images.tar", model, labels=tmp_path / "map.txt"))[1]
    assert torch.equal(found, wanted)
    with pytest.raises(tp.DataError, match="class folders: 2 classes, the model has 10"):
        open_pool(tmp_path / "images.tar", model, labels="folders")
    with pytest.raises(tp.DataError, match="no class map at"):
        open_pool(tmp_path / "images.tar", model, labels=tmp_path / "none.txt")
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_read_in_a_tar_file_is_skipped_and_not_replaced(
    folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    broken = sorted(folder.glob("*/*"))[4]
    broken.write_bytes(b"")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, arcname=".")
    pool = open_pool(tmp_path / "images.tar", model)
    seen = everything(pool)[0]
    assert len(seen) == 11
    assert list(pool.skipped) == ["4"]
    assert torch.equal(seen, everything(open_pool(folder, model))[0])
    gc.collect()


def test_a_shard_that_changes_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "s-0.tar").write_bytes(b"one")
    source = f"wds/{tmp_path / 'shards'}@s-{{0..0}}.tar|5"
    before = source_state(source)
    assert source_state(source) == before
    (tmp_path / "shards" / "another").write_bytes(b"no shard")
    assert source_state(source) == before
    (tmp_path / "shards" / "s-0.tar").write_bytes(b"other")
    assert source_state(source) != before


class Told:
    """A dataset that can be read from its beginning alone."""

    def __init__(self) -> None:
        self.items = [(image, i % 3) for i, (_, image) in enumerate(pictures())]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Any:
        return iter(self.items)


@pytest.fixture
def stream(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    asked: list[Any] = []
    monkeypatch.setattr(streams, "create_dataset", lambda *a, **k: (asked.append((a, k)), Told())[1])
    opened = open_pool("wds/shards@train-{0..3}.tar|12", model, labels="own")
    assert asked == [(("wds/shards",), {"split": "train-{0..3}.tar|12", "input_img_mode": "RGB", "root": "shards"})]
    return opened


def test_a_stream_gives_what_a_folder_gives(stream: Any, folder: Path, model: nn.Module) -> None:
    wanted, _ = everything(open_pool(folder, model))
    images, labels = everything(stream)
    assert torch.equal(images, wanted)
    assert labels.tolist() == [i % 3 for i in range(12)]
    assert torch.equal(everything(stream)[0], wanted)  # again and again
    assert len(stream.loader(5)) == 3
    even, odd = stream.split()
    assert torch.equal(everything(even)[0], wanted[::2])
    assert torch.equal(everything(odd)[0], wanted[1::2])
    assert (len(even), len(odd)) == (6, 6)
    assert torch.equal(everything(odd.sample(4))[0], wanted[1:9:2])
    assert len(odd.sample(4)) == 4
    held = even.part(lambda place: place % 3 == 2)
    assert torch.equal(everything(held)[0], wanted[::2][2::3])
    assert len(held) == 2


@pytest.mark.parametrize("buffer", [3, 100])
def test_a_shuffled_stream_holds_the_same_images_in_another_order(
    stream: Any, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BUFFER", buffer)
    plain, _ = everything(stream)
    one, again, other = (everything(stream, shuffle=True, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)
    assert sorted(one.flatten(1).sum(1).tolist()) == pytest.approx(sorted(plain.flatten(1).sum(1).tolist()))


def test_a_stream_can_be_scored_and_distilled_on(stream: Any, model: nn.Module) -> None:
    model.eval()
    batches = stream.loader(5)
    graph = tp.trace(model, next(iter(batches))[0][:1])
    plan = tp.allocate(tp.score(model, batches, graph), graph, tp.Budget(macs=0.7))
    small = tp.recover(tp.apply(model, plan), batches, teacher=model, finetune_with=tp.Finetune(epochs=1))
    assert sum(p.numel() for p in small.parameters()) == plan.params


@pytest.mark.parametrize("source", ["hfds/nobody/nothing@train", "torch/nothing@train", "gone.tar"])
def test_what_cannot_be_opened_is_named(source: str, model: nn.Module) -> None:
    with pytest.raises(tp.DataError, match="cannot be opened"):
        open_pool(source, model)


def test_a_folder_of_a_sets_name_is_a_folder(
    folder: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(tmp_path / "wds")
    monkeypatch.chdir(tmp_path)
    assert len(open_pool("wds", model)) == 12


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's readers close nothing
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_read_with_webdataset(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for name, image in pictures()[shard::2]:
                data = io.BytesIO()
                image.save(data, "png")
                for end, content in (
                    ("png", data.getvalue()),
                    ("cls", name[:1].replace("a", "0").replace("b", "1").encode()),
                ):
                    member = tarfile.TarInfo(f"{Path(name).stem}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    pool = open_pool(f"wds/{tmp_path}@shard-{{0..1}}.tar|12", model, labels="own")
    images, labels = everything(pool)
    wanted, _ = everything(open_pool(folder, model))
    assert torch.equal(images, torch.cat([wanted[::2], wanted[1::2]]))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] * 2
    del pool
    gc.collect()


def test_shards_that_are_not_counted_are_told_to_be(monkeypatch) -> None:
    monkeypatch.setattr(streams, "create_dataset", lambda *args, **kwargs: [])
    recipe = validate_recipe({"name": "a", "model": {"name": "test_resnet"}}, "a", ["data.images=wds/here@s-0.tar"])
    with pytest.raises(tp.DataError, match=r"holds no image; .* are counted by their name, as .*\.tar\|5000"):
        _ = Inputs(recipe).images
