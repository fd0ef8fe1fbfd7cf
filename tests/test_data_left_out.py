"""Nothing that has a caption vanishes in silence: encodings, names, kinds, links, sizes, structure of tars."""

import io
import os
import re
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from stable_cascade import bounds
from stable_cascade.data import index_samples
from stable_cascade.data.images import decode_image, image_size, looks_like_image
from stable_cascade.data.locations import may_pass, short
from stable_cascade.data.prepare import prepare_shards
from stable_cascade.data.tars import tar_members
from stable_cascade.disk import decode_text
from tests.making_shards import encoded, image, write_tar

TEXT = "ein grüner Apfel"
READ = {name: TEXT.encode(name) for name in ("utf-8", "utf-8-sig", "utf-16")} | {
    "utf-16-be": b"\xfe\xff" + TEXT.encode("utf-16-be")
}
JPEG = image(kind="JPEG")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(88)


def indexed(tmp_path, members, **options):
    path = write_tar(tmp_path / "a.tar", members)
    return index_samples(str(path), cache_dir=str(tmp_path / "cache"), **options)


def prepared(tmp_path, files, **options):
    for name, data in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    report = prepare_shards(tmp_path / "in", tmp_path / "out", **options)
    return report, index_samples(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))


def one_fault(tmp_path, members, **options):
    """What is told of the one sample among ten that cannot be used, in a tar and, for the same files, by `prepare`."""
    good = {f"{i}.png": image(seed=i) for i in range(9)} | {f"{i}.txt": "fine" for i in range(9)}
    samples = indexed(tmp_path, good | members, **options)
    assert (len(samples), samples.report.unreadable) == (9, 1)
    report, _ = prepared(tmp_path, good | members)
    assert report.samples == 9
    (told,) = report.broken
    return samples.report.unreadable_keys[0], told


@pytest.mark.parametrize("encoding", READ)
def test_marks_and_utf16_are_understood_everywhere(tmp_path, encoding):
    data = READ[encoding]
    assert decode_text(data) == TEXT
    assert indexed(tmp_path, {"a.jpg": JPEG, "a.txt": data}).caption(0) == TEXT
    assert prepared(tmp_path, {"a.jpg": JPEG, "a.txt": data})[1].caption(0) == TEXT
    (tmp_path / "in/a.txt").unlink()
    row = f"file_name,text\na.jpg,{TEXT}\n"
    (tmp_path / "in/metadata.csv").write_bytes(row.encode("utf-16") if "16" in encoding else row.encode(encoding))
    report = prepare_shards(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert report.samples == 1
    assert index_samples(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")).caption(0) == TEXT


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_with_a_mark_is_read_from_a_tar_and_by_prepare(tmp_path, encoding):
    data = f'{{"text": "{TEXT}"}}'.encode(encoding)
    assert indexed(tmp_path, {"a.jpg": JPEG, "a.json": data}, captions_getter="text").caption(0) == TEXT
    assert prepared(tmp_path, {"a.jpg": JPEG, "a.json": data})[1].caption(0) == TEXT


def test_other_encodings_are_counted_and_named(tmp_path):
    for told in one_fault(tmp_path, {"z.jpg": JPEG, "z.txt": TEXT.encode("cp1252")}):
        assert "z" in told
        assert "its caption is neither UTF-8 nor UTF-16 text; save it as UTF-8" in told


def test_a_table_in_another_encoding_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metadata '.*metadata.csv' is neither UTF-8 nor UTF-16 text"):
        prepared(tmp_path, {"a.jpg": JPEG, "metadata.csv": f"file_name,text\na.jpg,{TEXT}".encode("cp1252")})


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"z.jpg": JPEG, "z.txt": b"x" * 70_000}, "its caption has 70,000 bytes; at most 65,536 are read"),
        ({"z.heic": HEIC, "z.txt": b"x"}, "HEIC images are not read; convert it to JPEG or PNG"),
        ({"z.jpg": b"nothing", "z.txt": b"x"}, "no readable image"),
        (
            {"z.png": encoded(Image.new("RGB", (3000, 3))), "z.txt": b"x"},
            "3,000 x 3; one side may be at most 20 times",
        ),
    ],
)
def test_what_cannot_be_used_is_counted_and_named_in_a_tar_and_by_prepare(tmp_path, members, words):
    in_tar, by_prepare = one_fault(tmp_path, members)
    assert words in in_tar
    assert words in by_prepare or "cannot decode" in by_prepare


@pytest.mark.parametrize("name", ["jfif", "jpe", "jpg_large", "JPEG", "PNG", "jpeg_1"])
def test_what_is_an_image_is_known_by_its_bytes(tmp_path, name):
    files = {f"a.{name}": JPEG, "a.TXT": "an apple"}
    assert indexed(tmp_path, files).caption(0) == "an apple"
    assert prepared(tmp_path, files)[1].caption(0) == "an apple"


def test_signatures_are_those_that_pillow_writes():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000"):
        if kind in Image.SAVE or (Image.init() and kind in Image.SAVE):
            assert looks_like_image(encoded(image, kind)[:32]), kind
    assert looks_like_image(HEIC[:32])
    for other in (b"", b"hello world, this is a caption", b'{"a": 1}', b"\x93NUMPY"):
        assert not looks_like_image(other)


def test_a_caption_without_its_image_is_told(tmp_path):
    good = {f"{i}.png": image(seed=i) for i in range(19)} | {f"{i}.txt": "fine" for i in range(19)}
    samples = indexed(tmp_path, good | {"gone.txt": "a fox"})
    assert samples.report.unreadable == 1
    assert samples.report.unreadable_keys == ("a.tar/gone: it has a caption and no image ('txt')",)


def test_links_in_a_tar_are_told(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": image(), "a.txt": "fine", "b.txt": "linked"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"a.tar/b: its image is a link in the tar, not a file"):
        index_samples(str(path), cache_dir=str(tmp_path / "cache"))


def test_dotted_names_are_explained(tmp_path):
    name = "Screenshot 2024-01-02 at 10.11.12"
    with pytest.raises(ValueError, match=r"a key ends at the first dot of a name .*stable-cascade prepare"):
        indexed(tmp_path, {f"{name}.png": image(), f"{name}.txt": "a window"})
    assert prepared(tmp_path, {f"{name}.png": image(), f"{name}.txt": "a window"})[1].caption(0) == "a window"


def test_a_large_jpeg_is_tried_as_a_training_decodes_it(tmp_path):
    large = encoded(Image.new("RGB", (9000, 8000), (200, 30, 30)), "JPEG")
    with pytest.raises(ValueError, match="cannot decode"):
        decode_image(large)
    report, samples = prepared(tmp_path, {"a.jpg": large, "a.txt": "red"})
    assert (report.samples, report.broken, len(samples)) == (1, (), 1)


def test_linked_folders_are_searched_and_links_in_circles_end(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(image())
    (tmp_path / "elsewhere/a.txt").write_text("linked")
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "in/more")
    os.symlink(tmp_path / "in", tmp_path / "elsewhere/back")
    assert prepared(tmp_path, {})[1].caption(0) == "linked"


def test_pipes_and_devices_are_not_opened(tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in/a.png")
    os.symlink("/dev/zero", tmp_path / "in/b.png")
    files = {"a.txt": "x", "b.txt": "x"}
    with pytest.raises(ValueError, match=r"2 of 2 images are broken.*is a pipe or a device"):
        prepared(tmp_path, files)


def test_overwriting_leaves_tars_of_other_names(tmp_path):
    prepared(tmp_path, {"a.png": image(), "a.txt": "x"})
    (tmp_path / "out/00007.tar").write_bytes(b"an older shard")
    (tmp_path / "out/holiday.tar").write_bytes(b"mine")
    prepare_shards(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.tar", "holiday.tar"]


def test_pairs_given_as_a_data_set_lead_to_prepare(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.jpg").write_bytes(JPEG)
    (tmp_path / "set/a.txt").write_text("an apple")
    with pytest.raises(ValueError, match=r"images with .txt files beside them.*`stable-cascade prepare"):
        index_samples(dataset_name=str(tmp_path / "set"))


def header(size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        header(b"-0000001000"),
        header(b"+0000001000"),
        header(b"1_0"),
        header(b"\xff" * 12),
        header(b"\x80" + b"\xff" * 11),
        header(b"77777777777", b"x"),
        header(b"%011o" % 5100, b"x") + (b"5100 size=" + b"9" * 5089 + b"\n").ljust(5120, b"\0") + header(b"1"),
    ],
)
def test_sizes_that_no_member_can_have_are_one_line(content):
    with pytest.raises(ValueError, match=r"shard 'bad.tar' is damaged: .* copy or make it again") as caught:
        list(tar_members(io.BytesIO(content + bytes(10240)), "bad.tar"))
    assert "\n" not in str(caught.value)


def test_a_sparse_member_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header(b"%011o" % (3 << 30)))
        file.truncate((3 << 30) + 10240)
    with pytest.raises(ValueError, match=r"a: its caption|holds no images|its txt member has 3,221,225,472 bytes"):
        index_samples(str(path), cache_dir=str(tmp_path / "cache"))


def test_names_reach_no_terminal_raw(tmp_path):
    samples = indexed(tmp_path, {"a\x1b[31m\nb.png": image(), "a\x1b[31m\nb.txt": "x"})
    assert samples.key(0) == "a.tar/a\\x1b[31m\\nb"


@pytest.mark.parametrize("text", ["\\ud800", "a" * 70_000])
def test_captions_in_json_that_no_encoder_reads(tmp_path, text):
    members = {"a.jpg": JPEG, "a.json": f'{{"text": "{text}"}}'}
    with pytest.raises(ValueError, match="caption"):
        indexed(tmp_path, members, captions_getter="text").read(0)


def test_json_nested_deeply_is_a_fault_of_one_sample(tmp_path):
    with pytest.raises(ValueError, match="its JSON nests its brackets too deeply"):
        indexed(tmp_path, {"a.jpg": JPEG, "a.json": "[" * 100_000}, captions_getter="text")


def test_a_csv_field_beyond_the_readers_limit_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"metadata.csv' is no CSV that can be read: field larger"):
        prepared(tmp_path, {"a.jpg": JPEG, "metadata.csv": "file_name,text\na.jpg," + "x" * 200_000})


def test_the_first_failed_request_over_http_is_told_by_its_cause():
    """fsspec tells every failure of it as FileNotFoundError."""

    class Response(Exception):
        def __init__(self, status):
            super().__init__(f"{status}, message='x'")
            self.status = status

    def wrapped(cause):
        error = FileNotFoundError("https://host/a.tar")
        error.__cause__ = cause
        return error

    assert may_pass(wrapped(Response(503)))
    assert may_pass(wrapped(ConnectionResetError()))
    assert not may_pass(wrapped(Response(404)))
    assert not may_pass(wrapped(Response(403)))
    assert not may_pass(FileNotFoundError("x"))
    assert "the server refuses it (HTTP 403)" in short(wrapped(Response(403)))
    assert short(FileNotFoundError("x")) == "FileNotFoundError: x"


def test_extreme_shapes_are_refused_by_their_header():
    bounds.check_shape(2000, 100)
    with pytest.raises(ValueError, match=r"its size is 8,000,000 x 1"):
        bounds.check_shape(8_000_000, 1)
    with pytest.raises(ValueError, match="crop it"):
        image_size(encoded(Image.new("L", (4000, 1))))


GOOD = {f"{i}.png": image(seed=i) for i in range(19)} | {f"{i}.txt": "fine" for i in range(19)}
PAIR = {"z.png": image(seed=99), "z.txt": "x"}


@pytest.mark.parametrize("kind", [b"g", b"K", b"x", b"L"])
@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"\x80" + bytes(3) + (1 << 62).to_bytes(8, "big")])
def test_extended_headers_of_impossible_size_are_one_line(kind, size):
    with pytest.raises(ValueError, match=r"shard 'bad.tar' is damaged: .* claims [\d,]+ bytes; copy or make it again"):
        list(tar_members(io.BytesIO(header(size, kind) + bytes(10240)), "bad.tar"))


def test_a_header_of_a_megabyte_takes_a_moment():
    content = header(b"%011o" % (1 << 20), b"x") + (b"5 a=\n" * (1 << 18))[: 1 << 20]
    start = time.process_time()
    assert list(tar_members(io.BytesIO(content + bytes(10240)), "big.tar")) == []
    assert time.process_time() - start < 5  # slicing off one record after the other took 17 s


@pytest.mark.parametrize(("members", "links", "told"), [
    ({}, ("z.png", "z.txt"), "a.tar/z: its image is a link in the tar, not a file"),
    ({"z.png": image(seed=99)}, ("z.txt",), "a.tar/z: its caption is a link in the tar, not a file"),
    ({".z.png": image(seed=99), ".z.txt": "x"}, (),
     "a.tar/.z: its name begins with a dot, so it is hidden; rename it"),
    ({"z.png": image(seed=99), "z.txt": "x", "z.v2.png": image(seed=98), "z.v2.txt": "y"}, (),
     "a.tar/z.v2: it is not found, because a key ends at the first dot of a name"),
])  # fmt: skip
def test_pairs_that_a_tar_hides_are_told(tmp_path, members, links, told):
    path = write_tar(tmp_path / "a.tar", GOOD | members)
    with tarfile.open(path, "a") as tar:
        for number, name in enumerate(links):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[number], "0.png"
            tar.addfile(link)
    samples = index_samples(str(path), cache_dir=str(tmp_path / "cache"))
    assert samples.report.unreadable == 1
    assert samples.report.unreadable_keys[0].startswith(told)


@pytest.mark.parametrize("members", [
    {".DS_Store": "x", "._0.png": b"shadow", "._0.txt": "Mac OS X"}, {".z.png": image(seed=99)},
    {"0.thumb.png": image(seed=98)}, {"0.mask.png": image(seed=97)},
])  # fmt: skip
def test_what_was_not_meant_to_be_trained_is_not_told(tmp_path, members):
    assert indexed(tmp_path, GOOD | members).report.unreadable == 0


def captions_of(samples):
    return {samples.key(i).rsplit("/", 1)[1]: samples.caption(i) for i in range(len(samples))}


def test_prepare_gives_each_image_the_caption_of_its_own_name(tmp_path):
    files = {"A.png": image(seed=1), "A.txt": "upper", "a.png": image(seed=2), "a.TXT": "lower"}
    assert captions_of(prepared(tmp_path, files)[1]) == {"A": "upper", "a": "lower"}


def test_prepare_lends_no_caption_to_a_second_image(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 2 images have no caption, for example .*A\.png"):
        prepared(tmp_path, {"A.png": image(seed=1), "a.png": image(seed=2), "a.txt": "lower"})


@pytest.mark.parametrize(("files", "told"), [
    ({"gone.txt": "a fox"}, "left out: 1 texts have no image beside them, for example gone.txt"),
    ({"gone.psd": b"8BPS", "gone.json": '{"text": "a fox"}'}, "texts have no image beside them, for example gone.j"),
    ({".z.png": image(seed=99), ".z.txt": "x"}, "left out: 2 files and folders are hidden, their names begin with"),
    ({".more/z.png": image(seed=99)}, "left out: 1 files and folders are hidden, .* for example .more"),
])  # fmt: skip
def test_prepare_names_what_it_leaves_out(tmp_path, files, told):
    report, samples = prepared(tmp_path, GOOD | files)
    assert len(samples) == 19
    assert re.search(told, str(report))


def test_prepare_has_nothing_to_say_of_a_folder_in_order(tmp_path):
    report, _ = prepared(tmp_path, GOOD | {".DS_Store": "x", "._0.png": b"shadow"})
    assert report.notes == ()


def test_two_captions_in_rows_of_one_image_are_refused(tmp_path):
    rows = "file_name,text,score\nm.png,one,1\nm.png,{},2\n"
    files = {"m.png": image(), "metadata.csv": rows.format("two")}
    with pytest.raises(ValueError, match=r"metadata.csv' row 2 gives 'm.png' another text than a row before; keep"):
        prepared(tmp_path, files)
    assert captions_of(prepared(tmp_path, files | {"metadata.csv": rows.format("one")})[1]) == {"m": "one"}


def test_metadata_in_linked_folders_and_other_case_is_read(tmp_path):
    for name, data in {"q.png": image(), "Metadata.csv": b"file_name,text\nq.png,hello\n"}.items():
        (tmp_path / "else").mkdir(exist_ok=True)
        (tmp_path / "else" / name).write_bytes(data)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "more").symlink_to(tmp_path / "else")
    assert captions_of(prepared(tmp_path, GOOD)[1])["q"] == "hello"


def test_tars_of_other_names_in_a_folder_of_shards(tmp_path, caplog):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("00.tar", "01.TAR", ".02.tar"):
        write_tar(folder / name, {f"{name[-5]}{key}": value for key, value in PAIR.items()})
    (folder / "deeper").mkdir()
    write_tar(folder / "deeper" / "03.tar", PAIR)
    assert len(index_samples(str(folder), cache_dir=str(tmp_path / "cache"))) == 2
    assert "hidden tars are not read, for example '.02.tar'" in caplog.text
    assert "tars in its subfolders are not read, for example 'deeper/03.tar'" in caplog.text


@pytest.mark.parametrize("name", ["01.tar.gz", "01.tgz", "01.TAR.ZST"])
def test_compressed_tars_in_a_folder_of_shards_are_refused(tmp_path, name):
    write_tar(tmp_path / "00.tar", PAIR)
    (tmp_path / name).write_bytes(b"packed")
    with pytest.raises(ValueError, match=rf"holds 1 compressed tars, for example '{re.escape(name)}'; unpack them"):
        index_samples(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    write_tar(tmp_path / "01.tar", {"y.png": image(seed=5), "y.txt": "x"})  # unpacked beside it
    assert len(index_samples(str(tmp_path), cache_dir=str(tmp_path / "cache"))) == 2
