"""Every reader of the dataset: archives, videos, tables, ids and lists, damaged and hostile."""

from __future__ import annotations

import csv
import fractions
import io
import json
import shutil
import struct
import zipfile
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpamayo_dflash.clips.cache import find_snapshot
from alpamayo_dflash.clips.lists import chosen_clips, parse_cameras, parse_chunks, read_clip_list
from alpamayo_dflash.clips.members import MOST_MEMBER_BYTES
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.clips.video import Video
from alpamayo_dflash.common.artefacts import read_json, write_json
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.read import SCENES_FILE, read_scenes
from alpamayo_dflash.world.run import run
from tests.helpers.fuzzing import TEXTS, TRAP, VALUES, changed_values, damaged, fuzz_file, fuzzed, tried
from tests.helpers.small_artefacts import write_distill

CAMERA, MOTION = "camera_front_wide_120fov", "egomotion"
NAMES = (
    "../x",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "",
    ".",
    "..",
    "x" * 300,
    "a/b",
    "a\\b",
    "\ud800",
    "é",
    " a",
    "{clip_id}",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("worlds") / "world"
    run(WorldConfig(out, num_chunks=1, clips_per_chunk=2, seed=5, workers=1))
    return out


@pytest.fixture
def world(made, tmp_path):
    return shutil.copytree(made, tmp_path / "world")


def archive(world, feature):
    group = "labels" if feature == MOTION else "camera"
    return find_snapshot(world) / group / feature / f"{feature}.chunk_0000.zip"


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(members, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as new:
        for name, content in members.items():
            new.writestr(name, content)
    return file.getvalue()


def bomb(name, size):
    """An archive of a member of zeros, many times its size; written once for each size."""
    if size not in BOMBS:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new, new.open(name, "w") as stream:
            for _ in range(size // 2**20):
                stream.write(bytes(2**20))
        BOMBS[size] = file.getvalue()
    return BOMBS[size]


BOMBS: dict[int, bytes] = {}


@st.composite
def archives(draw, data):
    """The bytes of a file that was a chunk's archive."""
    kinds = ("bytes",) * 3 + ("member", "member", "names", "packed", "field", "field", "field", "bomb")
    match draw(st.sampled_from(kinds)):
        case "member":
            members = members_of(data)
            chosen = draw(st.sampled_from(sorted(members)))
            return zipped(members | {chosen: draw(damaged(members[chosen]))})
        case "names":
            members = members_of(data)
            chosen = draw(st.sampled_from(sorted(members)))
            new = draw(st.sampled_from(("../", "/", "a/../", "\\", "x"))) + chosen
            return zipped({new if name == chosen else name: each for name, each in members.items()})
        case "packed":
            packing = draw(st.sampled_from((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED)))
            return zipped(members_of(data), compression=packing)
        case "bomb":
            # Declared, and with a declaration that is too small.
            name = draw(st.sampled_from(sorted(members_of(data))))
            size = draw(st.sampled_from((2**23, 2**25)))
            bytes_ = bytearray(bomb(name, size))
            if draw(st.booleans()):
                place = bytes_.rindex(b"PK\x01\x02")
                declared = draw(st.sampled_from((0, 1000, MOST_MEMBER_BYTES + 1, 2**32 - 1)))
                bytes_[place + 24 : place + 28] = struct.pack("<I", declared)
            return bytes(bytes_)
        case "field":
            # Of a central header: version, flags (1: encrypted), method, crc, sizes, name's length, offset.
            changed = bytearray(data)
            starts = [at for at in range(len(data) - 46) if data[at : at + 4] == b"PK\x01\x02"]
            at = draw(st.sampled_from(starts))
            offset, size = draw(
                st.sampled_from(
                    ((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4))
                )
            )
            value = draw(
                st.sampled_from((0, 1, 2, 8, 12, 14, 99, 2**15, 2**16 - 1))
                | st.integers(0, 2 ** (8 * size) - 1)
            )
            changed[at + offset : at + offset + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
            return bytes(changed)
        case _:
            return draw(damaged(data))


def window_of(world):
    source = ClipSource(world, cameras=[1])
    return source.window(source.clip_ids()[0])


@pytest.mark.parametrize("feature", [CAMERA, MOTION])
def test_archives(world, feature):
    clip = ClipSource(world).clip_ids()[0]
    fuzz_file(
        f"clips: archive of {feature}",
        40,
        partial(window_of, world),
        archives,
        file=archive(world, feature),
        folder=clip,
    )


@pytest.fixture(scope="module")
def films():
    """Small films of several codecs and containers, and one that is no film."""
    import av

    def film(codec, container, pixels, width=64):
        file = io.BytesIO()
        with av.open(file, "w", format=container) as out:
            stream = out.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = width, 64, pixels
            for index in range(10):
                frame = av.VideoFrame.from_ndarray(
                    np.full((64, width, 3), index * 20, np.uint8), format="rgb24"
                )
                frame.pts, frame.time_base = index, fractions.Fraction(1, 10)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        return file.getvalue()

    def sound():
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as out:
            stream = out.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        return file.getvalue()

    kinds = [("libx264", "mp4", "yuv420p"), ("mpeg4", "mp4", "yuv420p"), ("mjpeg", "mp4", "yuvj420p")]
    kinds += [("png", "mov", "rgb24"), ("libx264", "matroska", "yuv420p"), ("mpeg4", "avi", "yuv420p")]
    lists = [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
    ]
    return [*(film(*kind) for kind in kinds), sound(), *lists]


@st.composite
def video_files(draw, data, films):
    """The bytes of a file that was an MP4, with boxes of other sizes and fields, or another film."""
    kind = draw(st.sampled_from(("bytes", "box", "field", "field", "film", "film")))
    if kind == "film":
        data = draw(st.sampled_from(films))
        return data if draw(st.booleans()) else draw(damaged(data))
    if kind == "bytes":
        return draw(damaged(data))
    changed = bytearray(data)
    boxes = (
        b"ftyp",
        b"moov",
        b"mvhd",
        b"trak",
        b"tkhd",
        b"mdia",
        b"mdhd",
        b"hdlr",
        b"minf",
        b"stbl",
        b"stsd",
    )
    boxes += (b"stts", b"stsc", b"stsz", b"stco", b"avc1", b"avcC", b"mdat", b"elst", b"stss", b"ctts")
    found = [box for box in boxes if box in data]
    at = data.index(draw(st.sampled_from(found)))
    if kind == "box":
        changed[at - 4 : at] = struct.pack(">I", draw(st.sampled_from((0, 1, 7, 8, 16, 2**31, 2**32 - 1))))
    else:
        place = at + 4 + draw(st.integers(0, 60))
        size = draw(st.sampled_from((1, 2, 4, 8)))
        value = draw(
            st.sampled_from((0, 1, 2**7, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            | st.integers(0, 2**64 - 1)
        )
        changed[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "big")
    return bytes(changed)


def test_videos(world, films):
    file = archive(world, CAMERA)
    clip = ClipSource(world).clip_ids()[0]
    members = members_of(file.read_bytes())
    name = f"{clip}.{CAMERA}.mp4"

    @fuzzed(70)
    @given(video_files(members[name], films))
    def each(data):
        file.write_bytes(zipped(members | {name: data}))
        tried("clips: MP4", clip, partial(window_of, world))

    each()


def test_other_formats_than_mp4_are_not_opened(films):
    for film in films[-4:]:
        with pytest.raises(Exception, match=r"Invalid data|no video"):
            Video(film)


KINDS = (
    pa.int64(),
    pa.int8(),
    pa.uint64(),
    pa.float32(),
    pa.float16(),
    pa.string(),
    pa.large_string(),
    pa.bool_(),
)
KINDS += (
    pa.binary(),
    pa.date32(),
    pa.timestamp("ns"),
    pa.timestamp("us", "UTC"),
    pa.duration("us"),
    pa.null(),
)
KINDS += (pa.decimal128(38, 2), pa.list_(pa.int32()), pa.list_(pa.string()), pa.struct([("a", pa.int64())]))
KINDS += (pa.dictionary(pa.int32(), pa.string()), pa.map_(pa.string(), pa.int64()), pa.time64("us"))


@st.composite
def columns_of(draw, kind, rows):
    """A column of a kind, with values at its ends, and holes."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        each = st.sampled_from([name for name in NAMES if "\ud800" not in name]) | st.text(max_size=5)
    elif pa.types.is_unsigned_integer(kind):
        each = st.sampled_from((0, 2**kind.bit_width - 1, 5_000_000))
    elif pa.types.is_integer(kind):
        each = st.sampled_from((0, -1, 2 ** (kind.bit_width - 1) - 1, -(2 ** (kind.bit_width - 1)), 7))
    elif pa.types.is_floating(kind):
        each = st.sampled_from((0.0, -1.0, float("nan"), float("inf"), 1e3))
    elif pa.types.is_boolean(kind):
        each = st.booleans()
    elif kind == pa.list_(pa.int32()):
        each = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3)
    else:
        return pa.nulls(rows, kind)
    if draw(st.booleans()):
        each = each | st.none()
    pool = draw(st.lists(each, min_size=1, max_size=4))
    return pa.array([pool[index % len(pool)] for index in range(rows)], kind)


@st.composite
def table_files(draw, data):
    """The bytes of a file that was a Parquet table."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(data))
    table = pq.read_table(io.BytesIO(data))
    pandas = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    for _ in range(draw(st.integers(1, 2))):
        index = draw(st.integers(0, table.num_columns - 1))
        name = table.column_names[index]
        match draw(
            st.sampled_from(("kind", "kind", "values", "drop", "rename", "twice", "rows", "metadata"))
        ):
            case "kind":
                kind = draw(st.sampled_from(KINDS))
                table = table.set_column(index, name, draw(columns_of(kind, table.num_rows)))
            case "values":
                kind = table.schema.field(index).type
                table = table.set_column(index, name, draw(columns_of(kind, table.num_rows)))
            case "drop" if table.num_columns > 1:
                table = table.remove_column(index)
            case "rename":
                names = list(table.column_names)
                names[index] = draw(st.sampled_from(("", "x", names[0], "a\0b", "x" * 300)))
                table = table.rename_columns(names)
            case "twice":
                table = table.append_column(name, table.column(index))
            case "rows":
                count = draw(st.sampled_from((0, 1, 2, 3, 10**4)))
                table = (
                    table.take(pa.array(np.arange(count) % max(table.num_rows, 1)))
                    if table.num_rows
                    else table
                )
            case _:
                text = (
                    draw(st.sampled_from(TEXTS))
                    if draw(st.booleans())
                    else json.dumps(draw(changed_values(pandas)))
                )
                table = table.replace_schema_metadata({b"pandas": text.encode("utf-8", "surrogatepass")})
    file = io.BytesIO()
    pq.write_table(table, file, compression=draw(st.sampled_from(("snappy", "zstd", "none", "gzip"))))
    return file.getvalue()


@pytest.mark.parametrize(
    ("feature", "ending"), [(CAMERA, f"{CAMERA}.timestamps.parquet"), (MOTION, f"{MOTION}.parquet")]
)
def test_tables_of_a_clip(world, feature, ending):
    file = archive(world, feature)
    clip = ClipSource(world).clip_ids()[0]
    members = members_of(file.read_bytes())
    name = f"{clip}.{ending}"

    @fuzzed(45)
    @given(table_files(members[name]))
    def each(data):
        file.write_bytes(zipped(members | {name: data}))
        tried(f"clips: table of {feature}", clip, partial(window_of, world))

    each()


@pytest.mark.parametrize(
    "table", ["clip_index.parquet", "metadata/feature_presence.parquet", "metadata/data_collection.parquet"]
)
def test_tables_of_the_dataset(world, table):
    def read():
        source = ClipSource(world)
        try:
            source.clip_ids()
        except ValueError as error:
            raise ValueError(f"{world}: {error}") from None  # that there is no clip names no file

    file = find_snapshot(world) / table
    fuzz_file(f"clips: {table}", 50, read, table_files, file=file, folder=world)


@st.composite
def feature_tables(draw, data):
    """The bytes of a file that was features.csv."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(data))
    rows = list(csv.reader(io.StringIO(data.decode())))
    hostile = (
        "../../x.zip",
        "/etc/passwd",
        "{chunk_id:099999999999d}",
        "{chunk_id.__class__}",
        "{0}",
        "{",
        "{}",
        "",
    )
    hostile += (
        "{clip_id!r}",
        "a\0b",
        "x" * 300,
        '{"video": "../{clip_id}"}',
        '{"video": 7}',
        '["a"]',
        "7",
        "null",
    )
    hostile += (
        '{"video": "{clip_id:>99999999999}"}',
        '{"video": "{clip_id.__init__.__globals__}"}',
        "{}",
        "[" * 10**4,
    )
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(rows) - 1))
        match draw(st.sampled_from(("cell", "cell", "cell", "drop", "twice", "more"))):
            case "cell" if rows[row]:
                column = draw(st.integers(0, len(rows[row]) - 1))
                rows[row][column] = draw(st.sampled_from(hostile) | st.text(max_size=9))
            case "drop" if rows[row]:
                rows[row].pop()
            case "twice":
                rows.append(list(rows[row]))
            case _:
                rows[row].append(draw(st.sampled_from(hostile)))
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def test_the_table_of_features(world):
    def read():
        source = ClipSource(world, cameras=[1])
        try:
            source.window(source.clip_ids()[0])
        except ValueError as error:
            raise ValueError(f"{world}: {error}") from None  # a clip's error names the clip

    fuzz_file(
        "clips: features.csv",
        120,
        read,
        feature_tables,
        file=find_snapshot(world) / "features.csv",
        folder=world,
    )


def test_scenes_of_a_world(world):
    fuzz_file(
        "world: scenes",
        60,
        partial(read_scenes, world),
        table_files,
        file=find_snapshot(world) / SCENES_FILE,
        folder=world,
    )


def test_tables_of_samples(tmp_path):
    write_distill(tmp_path)
    manifest = tmp_path / "manifest-rank0.json"
    content = read_json(manifest)  # of before there were hashes of rows
    for shard in content["shards"]:
        shard.pop("rows", None)
    write_json(manifest, content)
    read = partial(DistillData, tmp_path)
    fuzz_file(
        "distill: table of samples",
        60,
        read,
        table_files,
        file=tmp_path / "samples-rank0.parquet",
        folder=tmp_path,
    )


def test_a_table_that_unpacks_to_a_hundred_gigabytes(tmp_path):
    file = tmp_path / "clips.parquet"
    ids = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**5, np.int32)), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"clip_id": ids}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 2**20
    tried("clips: list in Parquet", file, partial(read_clip_list, file))


def test_lists_of_clips(tmp_path):
    file = tmp_path / "clips.parquet"
    pq.write_table(pa.table({"clip_id": ["a", "b"]}), file)
    fuzz_file(
        "clips: list in Parquet", 60, partial(read_clip_list, file), table_files, file=file, folder=tmp_path
    )
    file = tmp_path / "clips.txt"
    file.write_text("clip-1\nclip-2\n")

    def lines(data):
        names = st.sampled_from([name.encode("utf-8", "surrogatepass") for name in NAMES]) | st.binary(
            max_size=9
        )
        return damaged(data) | st.lists(names, max_size=4).map(b"\n".join)

    fuzz_file("clips: list in text", 60, partial(read_clip_list, file), lines, file=file, folder=tmp_path)


def test_ids_of_clips(made):
    source = ClipSource(made)
    known = source.clip_ids()[0]
    texts = st.sampled_from(
        (*NAMES, *[value for value in VALUES if isinstance(value, str)], known, f"{known}\n")
    )

    @fuzzed(60)
    @given(texts | st.text(max_size=9))
    def each(text):
        tried("clips: id in an option", "clip", partial(chosen_clips, source, clip_id=text))
        tried("clips: id of a window", "clip", partial(source.window, text, 10**18))

    each()


def test_lists_in_options():
    numbers = st.sampled_from(
        ("0-3,7", "0-999999999999", "9" * 5000, "3-1", "", "-", "0-", "٣", "1,,2", "1e3", "0x1")
    )

    @fuzzed(40)
    @given(numbers | st.text("0123456789-, ", max_size=9))
    def each(text):
        tried("clips: chunks in an option", "", partial(parse_chunks, text))
        tried("clips: cameras in an option", "", partial(parse_cameras, text))

    each()


def test_references_of_a_cache(world):
    file = find_snapshot(world).parents[1] / "refs" / "main"

    def lines(data):
        others = (
            b"../../x",
            b"\0",
            b"main",
            b"a" * 40,
            b"A" * 40,
            b"\xff" * 40,
            data + b"\n",
            b" ",
            TRAP.encode(),
        )
        return damaged(data) | st.sampled_from(others)

    fuzz_file("clips: refs/main", 40, partial(find_snapshot, world), lines, file=file, folder=world)
