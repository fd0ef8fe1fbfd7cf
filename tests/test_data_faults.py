"""Tars and image headers read by our own readers: equal to tarfile and Pillow, and strict about damage."""

from __future__ import annotations

import io
import logging
import tarfile
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from stable_cascade.data import index_samples
from stable_cascade.data.images import image_size, plain_size
from stable_cascade.data.locations import ShardFailure
from stable_cascade.data.tars import tar_members
from tests.making_shards import batches_of, encoded, image, undecodable, write_shard, write_tar

LONG = "a/" * 40 + "folder-" * 10 + "/" + "n" * 90
NAMES = ("0.png", "dir/1.png", LONG + ".png", "snö/日本.png", "f" * 99 + ".png", "p" * 60 + "/" + "q" * 90 + ".txt")
SETTINGS = {"image_size": 32, "batch_size": 8, "bucket_factor": 8, "seed": 3}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=kind, pax_headers={"comment": "global"}) as tar:
        for number, name in enumerate(NAMES):
            if kind == tarfile.USTAR_FORMAT and max(map(len, name.split("/"))) > 98:
                continue  # old headers cannot hold it
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            tar.addfile(info, io.BytesIO(bytes(info.size)))
            link = tarfile.TarInfo(f"link{number}")
            link.type, link.linkname = tarfile.SYMTYPE, "x" * 150 if kind != tarfile.USTAR_FORMAT else "x"
            tar.addfile(link)
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    with tarfile.open(path) as tar:
        expected = [(member.name, (member.offset_data, member.size)) for member in tar if member.isreg()]
    with path.open("rb") as file:
        assert list(tar_members(file, "a.tar")) == expected


def test_binary_sizes():
    """GNU tar writes sizes of 8 GB and more in base 256."""
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 30
    (found,) = islice(tar_members(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT)), "a"), 1)
    assert found == ("big.bin", (512, 9 << 30))


def test_every_damaged_header_byte_is_seen(tmp_path):
    content = bytearray(write_shard(tmp_path / "a.tar", 2).read_bytes())
    header = 512 + -(-len(image(40, 30)) // 512) * 512
    for byte in range(512):
        if byte == 155:  # the filler behind the checksum
            continue
        damaged = bytearray(content)
        damaged[header + byte] ^= 0x41
        with pytest.raises(ShardFailure, match=rf"the header at byte {header} is invalid"):
            list(tar_members(io.BytesIO(bytes(damaged)), f"{byte}.tar"))


def test_sizes_are_those_of_pillow():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = [
        encoded(image.convert(mode), "PNG", **options)
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")
        for options in ({}, {"dpi": (72, 72)})
    ]
    plain += [encoded(image.convert(mode), "JPEG", progressive=p) for mode in ("RGB", "L", "CMYK") for p in (0, 1)]
    for data in plain:
        assert plain_size(data) == image_size(data) == (21, 13)
    full = [encoded(image, kind, exif=exif) for kind in ("PNG", "JPEG")]
    full += [encoded(image, kind) for kind in ("WEBP", "BMP", "GIF", "TIFF")]
    for data in full:
        assert plain_size(data) is None
    for data in (plain[0], plain[-1]):
        for end in range(len(data)):
            assert plain_size(data[:end]) in (None, (21, 13))
    broken = bytearray(plain[0])
    broken[20] ^= 1  # the height, which the chunk's checksum guards
    assert plain_size(bytes(broken)) is None


def twenty_shards(folder) -> None:
    for i in range(20):
        write_shard(folder / f"{i:02}.tar", 4, start=4 * i)


@pytest.mark.parametrize("damage", ["truncated", "damaged"])
def test_a_bad_shard_among_many_is_skipped_counted_and_named(tmp_path, caplog, damage):
    twenty_shards(tmp_path / "set")
    path = tmp_path / "set" / "07.tar"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        with tarfile.open(path) as tar:
            content[tar.getmembers()[4].offset] ^= 0xFF
    path.write_bytes(content)
    options = {"cache_dir": str(tmp_path / "cache")}
    with caplog.at_level(logging.WARNING):
        samples = index_samples(str(tmp_path / "set"), **options)
    assert len(samples) == 76
    assert len(samples.report.skipped_shards) == 1
    assert f"1 shards skipped: shard '{path}' is {damage}" in str(samples.report)
    assert f"skipped in this run: shard '{path}' is {damage}" in caplog.text
    keys = [key for batch in islice(batches_of(samples, **SETTINGS), 19) for key in batch.keys]
    assert not any(key.startswith("07.tar") for key in keys)
    with pytest.raises(
        ValueError, match=rf"^1 of 20 shards fail, more than max_broken_share 0\.01; shard '.*{damage}"
    ):
        index_samples(str(tmp_path / "set"), max_broken_share=0.01, **options)
    write_shard(path, 4, start=28)
    assert len(index_samples(str(tmp_path / "set"), **options)) == 80, "a repaired shard is found at the next start"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_truncated_while_training(tmp_path, caplog, workers):
    twenty_shards(tmp_path / "set")
    samples = index_samples(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "set" / "07.tar"
    with path.open("r+b") as file:
        file.truncate(100)
    batches = list(islice(batches_of(samples, num_workers=workers, **SETTINGS), 10))
    assert sum(batch.broken for batch in batches) == 4
    assert not any(key.startswith("07.tar") for batch in batches for key in batch.keys)
    for i in range(28, 32):
        assert f"broken sample replaced: 07.tar/{i:04}: shard '{path}' ends early" in caplog.text


def test_corrupt_images_of_every_kind(tmp_path, caplog):
    """Damaged in the header: left out of the index. Damaged in the pixels: replaced. Both are named."""
    members: dict[str, bytes | str] = {}
    jpeg = image(64, 64, kind="JPEG", quality=95)
    bad = {"header.png": b"\x89PNG\r\n\x1a\n" + bytes(40), "empty.jpg": b"", "cut.jpg": jpeg[: len(jpeg) // 2]}
    bad |= {"zeros.png": undecodable()[:60] + bytes(60), "text.webp": b"no image at all"}
    for i in range(60):
        members |= {f"{i:02}.png": image(seed=i), f"{i:02}.txt": "fine"}
    for name, data in bad.items():
        members |= {name: data, f"{name.split('.')[0]}.txt": "broken"}
    with caplog.at_level(logging.WARNING):
        samples = index_samples(str(write_tar(tmp_path / "a.tar", members)), cache_dir=str(tmp_path / "cache"))
    assert samples.report.unreadable == 3
    assert {told.split(":")[0] for told in samples.report.unreadable_keys} == {
        f"a.tar/{n}" for n in ("header", "empty", "text")
    }
    batches = list(islice(batches_of(samples, **SETTINGS), 31))
    assert {caption for batch in batches for caption in batch.captions} == {"fine"}
    assert sum(batch.broken for batch in batches) == 2 * 4, "two in each of four epochs"
    assert "broken sample replaced: a.tar/cut" in caplog.text
    assert "broken sample replaced: a.tar/zeros" in caplog.text
