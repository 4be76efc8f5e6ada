from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, features
from timm.data import create_transform, resolve_data_config
from torch import nn

import tpvprune as tp
from tpvprune.zoo.data import input_size, open_pool, source_state
from tpvprune.zoo.models import create_model


@pytest.fixture
def model() -> nn.Module:
    return create_model("cifar_resnet20", args={"num_classes": 2})


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), (shade, shade, shade)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        picture(tmp_path / "images" / ("cat" if i % 3 else "dog") / f"{i:02d}.png", 20 * i)
    (tmp_path / "images" / ".hidden").write_text("not looked at")
    return tmp_path / "images"


def test_a_folder_is_read_in_the_order_of_its_paths(folder: Path, model: nn.Module) -> None:
    pool = open_pool(folder, model)
    assert len(pool) == 10
    assert not pool.labelled
    image, label = pool[0]
    assert image.shape == (3, 32, 32)
    assert label == -1
    shades = [float(pool[i][0].mean()) for i in range(10)]
    cats, dogs = shades[:6], shades[6:]
    assert cats == sorted(cats)
    assert dogs == sorted(dogs)


def test_even_positions_are_scored_and_odd_ones_measured(folder: Path, model: nn.Module) -> None:
    pool = open_pool(folder, model)
    score, measure = pool.split()
    assert (score.positions, measure.positions) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])
    assert not set(score.sample(3, seed=1).positions) & set(measure.positions)


def test_samples_are_seeded_and_in_order(folder: Path, model: nn.Module) -> None:
    pool = open_pool(folder, model)
    a, b, c = pool.sample(4, seed=1), pool.sample(4, seed=1), pool.sample(4, seed=2)
    assert a.positions == b.positions == sorted(a.positions)
    assert a.positions != c.positions
    assert pool.sample(None) is pool.sample(99) is pool


def test_labels_come_from_folders_or_a_class_map(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    by_folder = open_pool(folder, model, labels="folders")
    assert [by_folder[i][1] for i in range(10)] == [0] * 6 + [1] * 4
    (tmp_path / "map.txt").write_text("dog a dog\ncat a cat\n")
    by_map = open_pool(folder, model, labels=tmp_path / "map.txt")
    assert [by_map[i][1] for i in range(10)] == [1] * 6 + [0] * 4


@pytest.mark.parametrize(
    ("text", "match"),
    [("dog\n", "1 classes, the model has 2"), ("dog\ncow\n", "folder 'cat' is not in"), (None, "no class map")],
)
def test_labels_that_do_not_fit_are_refused(
    folder: Path, model: nn.Module, tmp_path: Path, text: str | None, match: str
) -> None:
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
    with pytest.raises(tp.DataError, match=match):
        open_pool(folder, model, labels=tmp_path / "map.txt")


def test_files_that_are_no_images_are_skipped_up_to_a_tenth(folder: Path, model: nn.Module) -> None:
    (folder / "cat" / "notes.txt").write_text("no image")
    pool = open_pool(folder, model)
    assert len(pool) == 10
    assert [Path(name).name for name in pool.skipped] == ["notes.txt"]
    (folder / "cat" / "more.txt").write_text("no image")
    with pytest.raises(tp.DataError, match=r"2 of 12 files are no images \(first: cat.more.txt\)"):
        open_pool(folder, model)


def test_images_that_break_later_are_left_out_of_their_batch(folder: Path, model: nn.Module) -> None:
    pool = open_pool(folder, model)
    broken = sorted(folder.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    batches = list(pool.loader(4))
    assert [len(x) for x, _ in batches] == [3, 4, 2]
    assert len(pool.skipped) == 1


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
@pytest.mark.parametrize("when", ["opened", "decoded"])
def test_damaged_avif_files_are_skipped(folder: Path, model: nn.Module, when: str) -> None:
    file = folder / "cat" / "11.avif"
    picture(file, 90)
    whole = file.read_bytes()
    for place in range(8, len(whole)):  # a byte that the decoder stumbles over, when it is asked for that
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        stage = "opened"
        try:
            with Image.open(file) as image:
                stage = "decoded"
                image.load()
        except RuntimeError:
            if stage == when:
                break
        except (OSError, SyntaxError, ValueError):
            continue
    else:
        pytest.fail("no byte does it")
    pool = open_pool(folder, model)
    assert sum(len(x) for x, _ in pool.loader(4)) == 10
    assert list(pool.skipped) == ["cat/11.avif"]


def test_loaders_can_be_read_again_and_shuffle_by_seed(folder: Path, model: nn.Module) -> None:
    pool = open_pool(folder, model, labels="folders")
    loader = pool.loader(4)
    first, again = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert torch.equal(first, again)
    assert len(loader) == 3
    orders = [torch.cat([x for x, _ in pool.loader(4, shuffle=True, seed=s)]) for s in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_arrays_are_taken_as_they_are(tmp_path: Path, model: nn.Module) -> None:
    x, y = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype("float32"), np.arange(5) % 2
    np.savez(tmp_path / "both.npz", x=x, y=y)
    np.save(tmp_path / "only.npy", x)
    both, only = (open_pool(tmp_path / name, model, size=8) for name in ("both.npz", "only.npy"))
    assert both[3][1] == 1
    assert only[3][1] == -1
    assert np.array_equal(both[3][0].numpy(), x[3])
    assert np.array_equal(only[3][0].numpy(), x[3])
    with pytest.raises(tp.DataError, match=r"only\.npy holds images of 8 x 8, .* leave size=9 \(data\.size\) out"):
        open_pool(tmp_path / "only.npy", model, size=9)
    with pytest.raises(tp.DataError, match=r"only\.npy holds images of 8 x 8, and the model is for 32 x 32.*size=8"):
        open_pool(tmp_path / "only.npy", model)
    np.save(tmp_path / "wide.npy", x[:, :, :6])
    assert open_pool(tmp_path / "wide.npy", model)[0][0].shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros((5, 1), int), r"y is int64 \(5, 1\); it must be whole numbers"),
        (np.zeros(5), r"y is float64 \(5,\)"),
        (np.array(["a"] * 5), r"y is <U1 \(5,\)"),
        (np.array(3), r"y is int64 \(\)"),
        (np.arange(5), "y holds label 4, and the model has 2 classes"),
    ],
)
def test_labels_of_arrays_are_whole_numbers_of_classes(
    tmp_path: Path, model: nn.Module, y: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((5, 3, 32, 32), "float32"), y=y)
    with pytest.raises(tp.DataError, match=message):
        open_pool(tmp_path / "x.npz", model)


def test_labels_beside_those_that_arrays_have_are_refused(tmp_path: Path, model: nn.Module) -> None:
    x = np.zeros((4, 3, 32, 32), np.float32)
    np.savez(tmp_path / "both.npz", x=x, y=np.zeros(4, np.int64))
    np.save(tmp_path / "only.npy", x)
    for labels in ("folders", str(tmp_path / "gone.txt")):
        with pytest.raises(
            tp.DataError, match=r"\(--labels\) .*both\.npz, which has labels of its own; leave them out"
        ):
            open_pool(tmp_path / "both.npz", model, labels=labels)
        with pytest.raises(tp.DataError, match=r"only\.npy, which is in no folders; labels of arrays .* as y"):
            open_pool(tmp_path / "only.npy", model, labels=labels)
        with pytest.raises(tp.DataError, match="digits, which has labels of its own"):
            open_pool("digits", model, labels=labels)
    assert open_pool(tmp_path / "both.npz", model, labels="own").labelled
    with pytest.raises(tp.DataError, match=r"only\.npy has no labels of its own"):
        open_pool(tmp_path / "only.npy", model, labels="own")


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_images_are_cropped_as_the_model_says(folder: Path, mode: str) -> None:
    model = create_model("test_resnet")
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": mode, "crop_pct": 0.9, "input_size": (3, 24, 24)}
    wanted = create_transform(**resolve_data_config(model=model))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(folder / "cat" / "wide.png")
    pool = open_pool(folder, model)
    for place, name in enumerate(sorted(folder.glob("*/*.png"))):
        with Image.open(name) as image:
            assert torch.equal(pool[place][0], wanted(image.convert("RGB")))


def test_folders_behind_links_are_read_once(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(folder / "cat")
    (tmp_path / "linked" / "dog").symlink_to(folder / "dog")
    assert len(open_pool(tmp_path / "linked", model, labels="folders")) == 10
    before = source_state(tmp_path / "linked")
    picture(folder / "cat" / "more.png", 3)
    assert source_state(tmp_path / "linked") != before
    (folder / "again").symlink_to(folder / "cat")
    (folder / "cat" / "round").symlink_to(folder)
    pool = open_pool(folder, model, labels="folders")
    assert len(pool) == 11
    assert {name.split("/")[0] for name in pool._names} == {"cat", "dog"}


def test_classes_with_numbers_in_their_names_are_counted(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / "n" / str(number) / "0.png", 20 * number)
    pool = open_pool(tmp_path / "n", create_model("cifar_resnet20", args={"num_classes": 12}), labels="folders")
    assert {name: pool[place][1] for place, name in enumerate(pool._names)} == {f"{n}/0.png": n for n in range(12)}


def test_channels_are_those_of_images_where_a_model_folds_space_first() -> None:
    assert input_size(create_model("tresnet_m"))[0] == 3
    assert input_size(create_model("test_resnet", args={"in_chans": 1}))[0] == 1
    assert input_size(timm.create_model("test_resnet", in_chans=5))[0] == 5


def test_images_have_the_channels_of_a_model_or_are_given_as_arrays(folder: Path) -> None:
    with pytest.raises(tp.DataError, match=r"reads 4 channels.*\.npz"):
        open_pool(folder, timm.create_model("test_resnet", in_chans=4))


@pytest.mark.parametrize("bad", ["grey", "integers", "pickled", "text", "unnamed"])
def test_bad_arrays_are_refused(tmp_path: Path, model: nn.Module, bad: str) -> None:
    path = tmp_path / "x.npz"
    if bad == "grey":
        np.savez(path, x=np.zeros((4, 1, 8, 8), "float32"))
    elif bad == "integers":
        np.savez(path, x=np.zeros((4, 3, 8, 8), "uint8"))
    elif bad == "pickled":
        np.savez(path, x=np.array([{}, 2], dtype=object))
    elif bad == "unnamed":
        np.savez(path, images=np.zeros((4, 3, 8, 8), "float32"))
    else:
        path.write_text("no array")
    with pytest.raises(tp.DataError, match="preprocessed"):
        open_pool(path, model)


def test_nothing_there_is_told(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(tp.DataError, match=r"no folder of images at .*, a tar file, .*hfds/NAME@SPLIT"):
        open_pool(tmp_path / "gone", model)
    with pytest.raises(tp.DataError, match="holds no image among 0 files"):
        open_pool(tmp_path, model)


def test_the_size_is_that_of_the_model_unless_given(model: nn.Module) -> None:
    assert input_size(model) == (3, 32, 32)
    assert input_size(model, 48) == (3, 48, 48)
    assert input_size(create_model("test_vit", args={"img_size": 64})) == (3, 64, 64)
    assert input_size(create_model("test_resnet", args={"in_chans": 1})) == (1, 160, 160)


def test_digits_are_there_without_a_download(model: nn.Module) -> None:
    pytest.importorskip("sklearn")
    pool = open_pool("digits", model, size=16)
    assert len(pool) == 1797
    image, label = pool[7]
    assert image.shape == (3, 16, 16)
    assert label == 7


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch_in_the_order_of_one(
    folder: Path, model: nn.Module, world: int, shuffle: bool
) -> None:
    pool = open_pool(folder, model)
    how = {"shuffle": shuffle, "seed": 3}
    whole = pool.loader(4, **how)
    shares = [pool.loader(4, share=(rank, world), **how) for rank in range(world)]
    assert [loader.shared for loader in (whole, *shares)] == [False] + [True] * world
    for _ in range(2):  # and in the next pass, which has another order
        parts = [list(share) for share in shares]
        for number, (images, labels) in enumerate(whole):
            for rank in range(min(world, len(images))):
                assert torch.equal(parts[rank][number][0], images[rank::world])
                assert torch.equal(parts[rank][number][1], labels[rank::world])
            for rank in range(len(images), world):  # none was left for it, and it has to take part
                assert torch.equal(parts[rank][number][0], parts[rank][number - 1][0])
        assert {len(part) for part in parts} == {len(shares[0])} == {3}


def test_shares_of_broken_images_are_as_many_as_others(tmp_path: Path, model: nn.Module) -> None:
    for i in range(20):
        picture(tmp_path / f"{i:02d}.png", 10 * i)
    pool = open_pool(tmp_path, model).part(lambda place: place < 6)
    for broken in ("00", "04"):  # all of a share, at the start and later
        (tmp_path / f"{broken}.png").write_text("no image")
    first, other = (list(pool.loader(2, share=(rank, 2))) for rank in (0, 1))
    assert len(first) == len(other) == 3
    stood_in = [loader.stands_in for loader in (pool.loader(2, share=(0, 2)),) for _ in loader]
    assert stood_in == [True, False, True]
    assert torch.equal(first[0][0], pool[1][0][None])  # the first that can be read
    assert torch.equal(first[2][0], first[1][0])  # the one before
    assert set(pool.skipped) == {"00.png", "04.png"}


def test_workers_of_other_processes_vary_images_in_another_way(folder: Path, model: nn.Module) -> None:
    pool = open_pool(folder, model)
    drawn = []
    for rank in (0, 1, 2):
        pool._read = lambda place, augment: torch.rand(2)  # what augmentation would draw
        drawn.append(torch.cat([images for images, _ in pool.loader(4, workers=1, share=(rank, 3))]))
    assert len({tuple(numbers.flatten()[:2].tolist()) for numbers in drawn}) == 3


def test_what_other_processes_could_not_read_counts_toward_the_limit(folder: Path, model: nn.Module) -> None:
    pool = open_pool(folder, model)
    pool.skipped["cat/01.png"] = "broken here"
    pool.check_skipped()  # one of ten
    pool.skipped["cat/02.png"] = "broken there"
    with pytest.raises(tp.DataError, match=r"2 of 10 images cannot be read, the last is cat/02.png \(broken there\)"):
        pool.check_skipped()
