"""Published sets as they really are, a manifest that is the same each time, downloads over lines that break, and a brand that can be measured."""
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from vidgen.cli import main
from vidgen.clip import Clip
from vidgen.data import brand as brands, download as net, published
from vidgen.data.build import Near, Probes, build, condition
from vidgen.data.inspect import inspect
from vidgen.data.lookalike import SETS, boxes, film, lookalike, tagged
from vidgen.data.manifest import COLUMNS, Manifest, Sample, csv_rows, json_rows, read_manifest
from vidgen.data.sources import Files, folder, open_manifest, rows_of, webdataset, world
from vidgen.errors import Canceled
from vidgen.evaluate.brand import Brand, check
from vidgen.progress import Cancel
from vidgen.world import read


def lines(path):
    return [json.loads(text) for text in Path(path).read_text().splitlines()]


# the table

ODD = Sample("a.mp4", 'two "lines",\nand a comma', facts={"fps": 25.0, "frames": 9, "scores": {"aesthetic score": 7e-05}, "negative": "blurry", "start": 0.5, "note": ["x"], "licence": "MIT"})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_table_gives_back_what_went_in(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    data = Manifest((ODD, *world(3)))
    again = read_manifest(data.save(tmp_path / f"m{suffix}"))
    assert again.samples == data.samples and again.hash == data.hash


def test_a_table_has_the_columns_everybody_asks(tmp_path):
    Manifest((ODD,)).save(tmp_path / "m.csv")
    (_, row), = csv_rows(tmp_path / "m.csv")
    assert tuple(row) == COLUMNS and row["video_path"] == "a.mp4" and row["fps"] == "25.0" and json.loads(row["scores"]) == {"aesthetic score": 7e-05}


def test_hashes_that_shipped_models_recorded_are_still_right():
    assert world(1000).hash == "70a5e9edcbea59476ba73ee89deeb377b43c5a60ab170cb5ff2f1f8340792dce"
    old = Manifest((Sample("a.mp4", "words", None, {"k": 1}), Sample("b.mp4", "é", "c.png")))
    assert old.hash == hashlib.sha256('{"caption": "words", "facts": {"k": 1}, "media": "a.mp4"}\n{"caption": "é", "image": "c.png", "media": "b.mp4"}\n'.encode()).hexdigest()


def test_the_older_form_is_read(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"media": "world:3", "caption": "old", "facts": {"k": 1}}\n')
    assert read_manifest(tmp_path / "m.jsonl").samples == (Sample("world:3", "old", facts={"k": 1}),)


def test_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow"):
        Manifest((ODD,)).save(tmp_path / "m.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cell, column", [("nine", "frames"), ("{", "scores")])
def test_a_cell_that_is_no_number_is_named(tmp_path, cell, column):
    (tmp_path / "m.csv").write_text(f"video_path,{column}\na.mp4,{cell}\n")
    with pytest.raises(ValueError, match=f"line 2: {column}"):
        read_manifest(tmp_path / "m.csv")


def test_a_folder_with_its_table_can_be_moved(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.mp4").write_bytes(film())
    (tmp_path / "one/manifest.jsonl").write_text('{"video_path": "a.mp4", "prompt": "a star"}\n')
    hashes = {open_manifest(tmp_path / "one").hash}
    shutil.move(tmp_path / "one", tmp_path / "two")
    data = open_manifest(tmp_path / "two")
    assert data[0].clip().num_frames == 9 and {data.hash} == hashes and data.name == "two"


def test_a_window_of_a_film(tmp_path):
    (tmp_path / "a.mp4").write_bytes(film())
    whole = Clip.open(tmp_path / "a.mp4")
    part = Sample(str(tmp_path / "a.mp4"), "x", facts={"start": 0.25, "end": 0.75}).clip()
    assert np.array_equal(part.frames, whole.frames[2:6])
    with pytest.raises(ValueError, match="no frame"):
        Sample(str(tmp_path / "a.mp4"), "x", facts={"start": 9.0}).clip()


# addresses and folders

@pytest.mark.parametrize("address, error, word", [("world:none", ValueError, "number"), ("world:3/heldd", ValueError, "held"), ("brnd:3", ValueError, "brand"), ("no/where", FileNotFoundError, "vidgen data build")])
def test_wrong_addresses_say_what_is_right(address, error, word):
    with pytest.raises(error, match=word):
        open_manifest(address)


def test_addresses_of_the_world():
    assert open_manifest("world:7/held").samples == world(7, part="held").samples
    assert open_manifest("brand:5").samples == brands.brand(5).samples
    assert open_manifest("brand:5/held")[3].clip().num_frames == 17


def three(root):
    root.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (root / f"f{i}.mp4").write_bytes(film(i))
    return root


def layout_pairs(root):
    for i in range(3):
        (three(root) / f"f{i}.txt").write_text(f"caption {i}\n")


def layout_lines(root):
    three(root / "videos")
    (root / "prompts.txt").write_text("caption 0\ncaption 1\ncaption 2\n")
    (root / "videos.txt").write_text("videos/f0.mp4\nvideos/f1.mp4\nvideos/f2.mp4\n")


def layout_csv(root):
    three(root)
    (root / "metadata.csv").write_text("file_name,text\n" + "".join(f"f{i}.mp4,caption {i}\n" for i in range(3)))


def layout_jsonl(root):
    three(root)
    (root / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"f{i}.mp4", "caption": f"caption {i}"}) + "\n" for i in range(3)))


def layout_tar(root):
    root.mkdir()
    with tarfile.open(root / "shard-000.tar", "w") as tar:
        for i in range(3):
            for name, data in ((f"{i:09d}.mp4", film(i)), (f"{i:09d}.txt", f"caption {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("layout", [layout_pairs, layout_lines, layout_csv, layout_jsonl, layout_tar])
def test_the_layouts_trainers_read(tmp_path, layout):
    layout(tmp_path / "set")
    data = folder(tmp_path / "set")
    assert [s.caption for s in data] == ["caption 0", "caption 1", "caption 2"]
    assert [s.clip().hash for s in data] == [Clip.open(p).hash for p in sorted(three(tmp_path / "ref").glob("*.mp4"))]


def test_a_finetrainers_configuration(tmp_path):
    layout_pairs(tmp_path / "a")
    layout_lines(tmp_path / "b")
    (tmp_path / "config.json").write_text(json.dumps({"datasets": [{"data_root": "a", "dataset_type": "video", "id_token": "PIKA_CRUSH"}, {"data_root": "b"}]}))
    assert [s.caption for s in open_manifest(tmp_path / "config.json")][2:4] == ["PIKA_CRUSH caption 2", "caption 0"]


def test_lists_of_different_lengths_are_refused(tmp_path):
    layout_lines(tmp_path / "b")
    (tmp_path / "b/prompts.txt").write_text("one\n")
    with pytest.raises(ValueError, match="1 lines and videos.txt 3"):
        folder(tmp_path / "b")


def test_an_archive_cannot_write_elsewhere(tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo("../../../evil.mp4")
        info.size = len(film())
        tar.addfile(info, io.BytesIO(film()))
    row, = webdataset(tmp_path / "bad.tar", tmp_path / "deep/er/media")
    assert Path(row.sample.media).resolve().is_relative_to(tmp_path / "deep/er/media") and not list(tmp_path.glob("evil*"))


def test_a_table_of_others_with_a_missing_film(tmp_path):
    layout_csv(tmp_path / "set")
    (tmp_path / "set/f1.mp4").unlink()
    with pytest.raises(ValueError, match="1 of 3 rows.*(?s:.*)no such film"):
        open_manifest(tmp_path / "set/metadata.csv")


def test_names_in_tables_stay_below_the_folder(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(film())
    assert Files(three(tmp_path / "set")).find("../secret.mp4") is None


# published sets

@pytest.mark.parametrize("name", SETS)
def test_a_build_keeps_what_is_right_and_lists_the_rest(tmp_path, name):
    made = lookalike(name, tmp_path / name)
    built = build(name, tmp_path / name, tmp_path / "set")
    assert len(built.manifest) == made.samples
    assert not {Path(s.media).name for s in built.manifest} & set(made.broken)
    assert set(made.odd) <= {Path(s.media).name for s in built.manifest}
    details = " ".join(r.detail for r in built.dropped)
    assert all(Path(b).stem in details for b in made.broken), set(made.broken)
    counts = {k: v for k, v in built.facts["dropped"].items() if k not in ("truncated", "empty", "no video", "unreadable", "damaged")}
    assert counts == made.dropped
    assert built.facts["rows"] == made.samples + len(built.dropped)
    assert all(s.facts["sha256"] and s.facts["licence"] and s.facts["width"] and s.caption for s in built.manifest)


@pytest.mark.parametrize("name", ["vidprom", "msrvtt"])
def test_two_builds_give_the_same_files(tmp_path, name):
    lookalike(name, tmp_path / name)
    a, b = build(name, tmp_path / name, tmp_path / "a", workers=1), build(name, tmp_path / name, tmp_path / "b", workers=4)
    for file in ("manifest.jsonl", "dropped.jsonl", "build.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert a.manifest.hash == b.manifest.hash == open_manifest(tmp_path / "a").hash


def captions(name, root, **options):
    return [r.sample.caption for r in rows_of(name, root, **options) if r.sample]


def test_msrvtt(tmp_path):
    lookalike("msrvtt", tmp_path)
    train, test = captions("msrvtt", tmp_path, split="train"), captions("msrvtt", tmp_path, split="test")
    assert '"it\'s" quoted, over two lines' in train and len(train) + len(test) == len(captions("msrvtt", tmp_path))
    assert len(captions("msrvtt", tmp_path, captions="first")) < len(train)
    facts = next(r.sample.facts for r in rows_of("msrvtt", tmp_path) if r.sample)
    assert facts["source_start"] == 137.72 and "start" not in facts and facts["category"] in ("music", "people", "gaming")
    (tmp_path / "train_val_annotation/train_val_videodatainfo.json").unlink()
    (tmp_path / "test_videodatainfo.json").unlink()
    assert captions("msrvtt", tmp_path) == train  # from the zip it came in


def test_vatex_ids_and_languages(tmp_path):
    lookalike("vatex", tmp_path)
    assert published.vatex_id("-a_b_c-d_ef_000122_000132") == ("-a_b_c-d_ef", 122.0, 132.0)
    assert all(t.isascii() for t in captions("vatex", tmp_path, captions="first"))
    assert "一只狗在跑步，第0次" in captions("vatex", tmp_path, language="zh")
    with pytest.raises(ValueError, match="en, zh, both"):
        rows_of("vatex", tmp_path, language="de")


def test_panda_windows_marks_and_no_evaluation(tmp_path):
    lookalike("panda70m", tmp_path)
    rows = list(rows_of("panda70m", tmp_path))
    whole = [r.sample for r in rows if r.sample and "start" in r.sample.facts]
    assert [s.caption for s in whole] == ["a clip of a whole film that's there", "\"it's\" the second"] and whole[1].facts["start"] == 0.25
    everything = list(rows_of("panda70m", tmp_path, desirable=False, shots=0))
    assert {r.reason for r in rows} - {r.reason for r in everything} == {"not desirable", "several shots"}
    for bad in ("__import__('os').getcwd()", "[__import__('os').getcwd()]", "[1", "{'a': 1}", "[" * 5000):
        with pytest.raises(ValueError, match="list"):
            published.literal(bad)


def test_panda_windows_are_measured_as_windows(tmp_path):
    lookalike("panda70m", tmp_path / "p")
    built = build("panda70m", tmp_path / "p", tmp_path / "set")
    s, = (s for s in built.manifest if s.facts.get("start") == 0.25)
    assert (s.facts["duration"], s.facts["frames"]) == (0.5, 4) and len(s.clip()) == 4


def test_vidprom_prompts(tmp_path):
    assert published.clean("a fox &lt;b&gt; --ar 16:9 -neg text, -motion 4") == ("a fox <b>", "text,", {"ar": "16:9", "motion": "4"})
    assert published.clean("well-neg lit, pre-motion") == ("well-neg lit, pre-motion", "", {})
    lookalike("vidprom", tmp_path)
    samples = [r.sample for r in rows_of("vidprom", tmp_path, model="pika") if r.sample]
    quoted = next(s for s in samples if "over two lines" in s.caption)
    assert quoted.caption == 'he says "it\'s over two lines", and leaves' and "\n" in quoted.facts["raw_prompt"]
    assert next(s for s in samples if s.caption.startswith("一")).facts.get("scores") is None
    assert next(s for s in samples if "take 0" in s.caption).facts["scores"]["sexual_explicit"] == 7e-05


def test_a_missing_score_is_no_zero(tmp_path):
    lookalike("openvid", tmp_path / "o")
    samples = [r.sample for r in rows_of("openvid", tmp_path / "o") if r.sample]
    assert any("temporal consistency score" not in s.facts["scores"] for s in samples)
    built = build("openvid", tmp_path / "o", tmp_path / "set", where=["temporal consistency score>=0"])
    assert any(r.reason == "not temporal consistency score>=0" and "not known" in r.detail for r in built.dropped)
    with pytest.raises(ValueError, match="aesthetic score"):
        build("openvid", tmp_path / "o", tmp_path / "other", where=["aesthetic scores>=5"])


def test_pictures_are_what_they_are(tmp_path):
    lookalike("adimagenet", tmp_path / "a")
    built = build("adimagenet", tmp_path / "a", tmp_path / "set")
    odd = next(s for s in built.manifest if s.media.endswith("jpeg.png"))
    assert odd.facts["codec"] == "jpeg" and odd.facts["frames"] == 1
    assert {(s.facts["width"], s.facts["height"]) for s in built.manifest} >= {(728, 90), (160, 600)}


def test_adverts_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from vidgen.data.lookalike import picture
    rows = [{"image": {"bytes": picture(i), "path": None}, "text": f"SALE {i}" if i else "", "dimensions": "(300, 250)"} for i in range(3)]
    (tmp_path / "a").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a/train-00000-of-00001.parquet")
    built = build("adimagenet", tmp_path / "a", tmp_path / "set")
    assert [s.caption for s in built.manifest] == ["SALE 1", "SALE 2"] and built.facts["dropped"] == {"no caption": 1}


@pytest.mark.parametrize("name", SETS)
def test_an_empty_folder_says_which_file_is_missing(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="below"):
        build(name, tmp_path / "empty", tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="no folder"):
        build(name, tmp_path / "nowhere", tmp_path / "set")


# building

def test_nothing_left_is_an_error_that_lists_why(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.mp4").write_bytes(b"")
    (tmp_path / "f/a.txt").write_text("words")
    with pytest.raises(ValueError, match="none of 1 rows is left: 1 empty"):
        build("folder", tmp_path / "f", tmp_path / "set")
    assert lines(tmp_path / "set/dropped.jsonl")[0]["reason"] == "empty"


def test_another_set_is_not_overwritten(tmp_path):
    build("world", "8", tmp_path / "set")
    build("world", "8", tmp_path / "set")
    with pytest.raises(FileExistsError, match="root"):
        build("world", "9", tmp_path / "set")
    assert len(build("world", "9", tmp_path / "set", overwrite=True, table=".csv").manifest) == 9
    assert sorted(p.name for p in (tmp_path / "set").glob("manifest.*")) == ["manifest.csv"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="not made by a build"):
        build("world", "8", tmp_path / "mine")


@pytest.mark.parametrize("wish, word", [(dict(near=1.0), "near"), (dict(depth=4), "depth"), (dict(where=["duration"]), "compares"), (dict(table=".xml"), "kind of table"), (dict(splitt="x"), "option")])
def test_wrong_wishes_are_refused_before_any_work(tmp_path, wish, word):
    with pytest.raises(ValueError, match=word):
        build("world", "8", tmp_path / "set", **wish)
    assert not (tmp_path / "set/manifest.jsonl").exists()


def test_a_broken_off_build_goes_on_without_opening_films_again(tmp_path, monkeypatch):
    lookalike("vidprom", tmp_path / "v")
    stop, count = Cancel(), []

    def after_five(event):
        count.append(event.done)
        if event.done == 5:
            stop.cancel()

    with pytest.raises(Canceled):
        build("vidprom", tmp_path / "v", tmp_path / "set", workers=1, progress=after_five, cancel=stop)
    assert not (tmp_path / "set/manifest.jsonl").exists()
    with (tmp_path / "set/probes.jsonl").open("a") as file:
        file.write('{"key": "torn')
    before = len(Probes(tmp_path / "set/probes.jsonl", 2).known)
    opened = []
    from vidgen.data import build as page
    own = page.measured
    monkeypatch.setattr(page, "measured", lambda *a: opened.append(a) or own(*a))
    again = build("vidprom", tmp_path / "v", tmp_path / "set")
    assert before >= 5 and len(opened) + before == len({k for k in Probes(tmp_path / "set/probes.jsonl", 2).known})
    assert again.manifest.hash == build("vidprom", tmp_path / "v", tmp_path / "fresh").manifest.hash


def test_a_changed_film_is_opened_again(tmp_path):
    layout_pairs(tmp_path / "f")
    one = build("folder", tmp_path / "f", tmp_path / "set")
    (tmp_path / "f/f0.mp4").write_bytes(film(5))
    os.utime(tmp_path / "f/f0.mp4", ns=(1, 1))
    assert build("folder", tmp_path / "f", tmp_path / "set").manifest.hash != one.manifest.hash


def test_near_wordings():
    near, text = Near(0.7), "a chef rolls calmly in the garden while a penguin falls near the bridge"
    assert near.find(text) is None and near.find(text) is None
    assert near.find(text.replace("while", "as")) == text and near.find("a dog sleeps on the roof of a slow green train") is None
    rng = np.random.default_rng(0)
    words = [f"w{i:03d}" for i in range(400)]
    texts = [" ".join(rng.choice(words, 30)) for _ in range(300)]
    near = Near(0.8)
    assert not any(near.find(t) for t in texts)
    assert sum(near.find(t + " more") == t for t in texts) == 300


def test_near_duplicates_are_listed_when_asked(tmp_path):
    made = lookalike("openvid", tmp_path / "o")
    built = build("openvid", tmp_path / "o", tmp_path / "set", near=0.75)
    assert built.facts["dropped"]["near duplicate"] == 1 and len(built.manifest) == made.samples - 1


def test_conditions():
    c = condition("duration >= 1.5e0")
    assert (c.name, c.sign, c.value, str(c)) == ("duration", ">=", 1.5, "duration>=1.5")
    assert condition("words<3")(Sample("a", "two words")) and not condition("words<2")(Sample("a", "two words"))


@pytest.mark.parametrize("name", [pytest.param("world", marks=pytest.mark.slow), *SETS])
def test_a_thousand_samples(tmp_path, name):
    made = lookalike(name, tmp_path / name, 1000) if name != "world" else None
    built = build(name, tmp_path / name if made else "1000", tmp_path / "set", depth=1)
    assert len(built.manifest) >= 1000 and (not made or len(built.manifest) == made.samples)


# looking

def test_inspect_counts_what_is_there_and_what_is_not(tmp_path, capsys):
    made = lookalike("openvid", tmp_path / "o")
    build("openvid", tmp_path / "o", tmp_path / "set")
    found = inspect(tmp_path / "set").to_dict()
    assert "told apart by their bytes (SHA-256): two encodings of one film count as two" in repr(inspect(tmp_path / "set"))
    assert "2, told apart by their addresses" in repr(inspect("world:2"))
    assert found["samples"] == made.samples and found["sizes"] == {"96x64": made.samples - 1, "64x96": 1}
    assert found["special"] == {"turned": 1, "variable rate": 1} and found["dropped"]["duplicate"][0] == 2
    json.dumps(found)
    assert main(["data", "inspect", str(tmp_path / "set")]) == 0 and "CC BY 4.0" in capsys.readouterr().out
    assert Clip.open(tmp_path / "set/sheet.png").num_frames == 1


def test_a_sheet_of_broken_films_says_so(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"video_path": "gone.mp4", "prompt": "x"}\n')
    with pytest.raises(ValueError, match="vidgen data build"):
        inspect(tmp_path / "m.jsonl").sheet()


def test_films_in_archives_are_hinted_at(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/VidProM_unique.csv").write_text("uuid,prompt,time\nu1,a fox,now\n")
    with tarfile.open(tmp_path / "v/pika_videos_1.tar", "w") as tar:
        info = tarfile.TarInfo("pika_videos/pika-u1.mp4")
        info.size = len(film())
        tar.addfile(info, io.BytesIO(film()))
    with pytest.raises(ValueError, match="vidgen data unpack"):
        build("vidprom", tmp_path / "v", tmp_path / "set")
    assert main(["data", "unpack", str(tmp_path / "v")]) == 0
    assert build("vidprom", tmp_path / "v", tmp_path / "set").manifest[0].caption == "a fox"


# rows that are none

def test_a_csv_of_bytes_and_nul(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"file_name,text\na.mp4,caf\xe9\nb.mp4,nul\x00\nc.mp4,good\n")
    rows = list(csv_rows(tmp_path / "m.csv"))
    assert [where for where, _ in rows] == ["line 2", "line 3", "line 4"] and "UTF-8" in str(rows[0][1]) and rows[2][1] == {"file_name": "c.mp4", "text": "good"}
    (tmp_path / "m.jsonl").write_bytes(b'{"file_name": "a", "text": "\xff"}\n\n{"file_name": "b"}\n')
    assert [isinstance(v, ValueError) for _, v in json_rows(tmp_path / "m.jsonl")] == [True, False]


def test_tables_of_another_kind_and_rows_that_are_none(tmp_path):
    (tmp_path / "vatex_training_v1.0.json").write_text("{}")
    with pytest.raises(ValueError, match="should hold a list"):
        rows_of("vatex", tmp_path)
    (tmp_path / "vatex_training_v1.0.json").write_text('["x", {"videoID": "a_000001_000002", "enCap": "one text"}]')
    (tmp_path / "a_000001_000002.mp4").write_bytes(film())
    assert [(r.reason, r.sample and r.sample.caption) for r in rows_of("vatex", tmp_path)] == [("not a row", None), ("", "one text")]
    (tmp_path / "test_videodatainfo.json").write_text('{"videos": [3, {"video_id": "video1"}], "sentences": [null]}')
    assert [r.reason for r in rows_of("msrvtt", tmp_path)] == ["not a row", "not a row", "no such film"]
    (tmp_path / "p.csv").write_text("videoID,timestamp,caption,matching_score\nx,\"[['0:00:00.0', 'late'], 3]\",\"['a', 'b']\",\"['high', 1]\"\n")
    assert [r.reason for r in rows_of("panda70m", tmp_path)] == ["not a row", "not a row"]


def test_a_build_does_not_read_what_it_wrote(tmp_path):
    layout_pairs(tmp_path / "f")
    with pytest.raises(ValueError, match="outside"):
        build("folder", tmp_path / "f", tmp_path / "f/set")


def test_captions_in_films_are_read_without_decoding(tmp_path):
    world(1)[0].clip().save(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(b"")
    built = build("folder", tmp_path, tmp_path.parent / f"{tmp_path.name}-set")
    assert [s.caption for s in built.manifest] == [world(1)[0].clip().made["prompt"]] and built.facts["dropped"] == {"empty": 2}
    assert built.manifest[0].facts["source"] == "folder"


# downloads

class Server:
    "Files on this machine, sent the way bad servers do: `plan` holds what the next answers are."

    def __init__(self):
        self.files, self.plan, self.asked, self.etag = {}, [], [], '"v1"'
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, h):
        self.asked.append((h.path, h.headers.get("Range"), h.headers.get("Authorization")))
        step = self.plan.pop(0) if self.plan else "all"
        data = self.files.get(h.path.split("?")[0])
        if isinstance(step, int) or data is None:
            h.send_response(step if isinstance(step, int) else 404)
            h.send_header("Retry-After", "0")
            h.send_header("Content-Length", "0")
            return h.end_headers()
        if step[0] == "to":
            h.send_response(302)
            h.send_header("Location", step[1])
            return h.end_headers()
        asked = re.match(r"bytes=(\d+)-", h.headers.get("Range") or "")
        same = h.headers.get("If-Range") in (None, self.etag)
        start = int(asked[1]) if asked and same and step != "no ranges" else 0
        if start >= len(data) and start:
            h.send_response(416)
            h.send_header("Content-Length", "0")
            return h.end_headers()
        h.send_response(206 if start else 200)
        h.send_header("ETag", self.etag)
        h.send_header("Content-Length", str(len(data) - start))
        if start:
            h.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        h.end_headers()
        end = start + step[1] if step[0] == "first" else len(data)
        h.wfile.write(data[start:end])


@pytest.fixture
def server():
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


DATA = np.random.default_rng(0).bytes(900_000)
SHA = hashlib.sha256(DATA).hexdigest()


def get(server, path, **options):
    return net.fetch(f"{server.address}/f.bin", path, pause=0.001, timeout=5, **options)


def test_a_line_that_breaks_is_taken_up_where_it_broke(tmp_path, server):
    server.files["/f.bin"], server.plan = DATA, [("first", 300_000), ("first", 200_000), 503, ("first", 100_000)]
    assert get(server, tmp_path / "f.bin", sha256=SHA).read_bytes() == DATA
    assert [r for _, r, _ in server.asked] == [None, "bytes=300000-", "bytes=500000-", "bytes=500000-", "bytes=600000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]
    server.asked.clear()
    get(server, tmp_path / "f.bin", sha256=SHA)
    assert server.asked == []  # it is there


def test_a_later_call_goes_on(tmp_path, server):
    server.files["/f.bin"], server.plan = DATA, [("first", 300_000), 500, 500, 500]
    with pytest.raises(OSError, match="300,000 bytes are kept"):
        get(server, tmp_path / "f.bin", tries=2)
    assert not (tmp_path / "f.bin").exists()
    server.plan = []
    assert get(server, tmp_path / "f.bin").read_bytes() == DATA and server.asked[-1][1] == "bytes=300000-"


def test_another_version_begins_anew(tmp_path, server):
    server.files["/f.bin"], server.plan = DATA, [("first", 300_000), 500, 500]
    with pytest.raises(OSError):
        get(server, tmp_path / "f.bin", tries=2)
    server.files["/f.bin"], server.etag, server.plan = DATA[::-1], '"v2"', []
    assert get(server, tmp_path / "f.bin").read_bytes() == DATA[::-1]


def test_a_server_without_ranges(tmp_path, server):
    server.files["/f.bin"], server.plan = DATA, [("first", 300_000), "no ranges"]
    assert get(server, tmp_path / "f.bin", sha256=SHA).read_bytes() == DATA


def test_a_wrong_checksum_is_fetched_once_more_then_refused(tmp_path, server):
    server.files["/f.bin"] = DATA[:-1] + b"x"
    with pytest.raises(ValueError, match="SHA-256"):
        get(server, tmp_path / "f.bin", sha256=SHA)
    assert len(server.asked) == 2 and not list(tmp_path.iterdir())
    other = Server()
    other.files["/f.bin"] = DATA
    assert net.fetch([f"{server.address}/f.bin", f"{other.address}/f.bin"], tmp_path / "f.bin", sha256=SHA, pause=0.001).read_bytes() == DATA
    other.http.shutdown()


def test_a_file_that_is_there_and_wrong_is_replaced(tmp_path, server):
    server.files["/f.bin"] = DATA
    (tmp_path / "f.bin").write_bytes(b"an error page")
    assert get(server, tmp_path / "f.bin", sha256=SHA).read_bytes() == DATA


def test_a_full_part_without_the_rest_is_kept_out(tmp_path, server):
    server.files["/f.bin"] = DATA
    (tmp_path / "f.bin.part").write_bytes(DATA + b"more")
    assert get(server, tmp_path / "f.bin", sha256=SHA).read_bytes() == DATA


def test_mirrors_and_missing_files(tmp_path, server):
    other = Server()
    other.files["/f.bin"] = DATA
    assert net.fetch([f"{server.address}/f.bin", f"{other.address}/f.bin"], tmp_path / "f.bin").read_bytes() == DATA
    with pytest.raises(FileNotFoundError):
        net.fetch(f"{server.address}/gone", tmp_path / "g")
    with pytest.raises(ValueError, match="http"):
        net.fetch("file:///etc/hosts", tmp_path / "g")
    other.http.shutdown()


def test_a_token_stays_with_its_host(tmp_path, server):
    other = Server()
    server.files["/f.bin"], other.files["/cdn"], server.plan = DATA, DATA, [("to", f"{other.address}/cdn")]
    get(server, tmp_path / "f.bin", token="secret")
    assert server.asked[0][2] == "Bearer secret" and other.asked[0][2] is None
    other.http.shutdown()


def test_a_download_can_be_stopped_and_goes_on(tmp_path, server):
    server.files["/f.bin"], stop = DATA, Cancel()
    with pytest.raises(Canceled):
        get(server, tmp_path / "f.bin", cancel=stop, progress=lambda e: stop.cancel())
    assert 0 < (tmp_path / "f.bin.part").stat().st_size < len(DATA)
    assert get(server, tmp_path / "f.bin").read_bytes() == DATA


def hub(server, repo, files):
    entries = [{"type": "directory", "path": "data"}]
    for name, data in files.items():
        entries.append({"type": "file", "path": name, "size": len(data), "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}})
        server.files[f"/datasets/{repo}/resolve/main/{name}"] = data
    server.files[f"/api/datasets/{repo}/tree/main"] = json.dumps(entries).encode()


def test_a_set_of_the_hub(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    hub(server, "nkp37/OpenVid-1M", {"data/train/OpenVid-1M.csv": b"video,caption\n", "OpenVid_part102_partaa": b"PK", "OpenVid_part102_partab": b"..", "../evil.csv": b"x"})
    server.plan = ["all", ("first", 5)]
    made = net.download("openvid", tmp_path, pause=0.001)
    assert [p.relative_to(tmp_path).as_posix() for p in made] == ["data/train/OpenVid-1M.csv"] and made[0].read_bytes() == b"video,caption\n"
    assert "non-commercial" in (tmp_path / "LICENCE.txt").read_text() and json.loads((tmp_path / "downloads.json").read_text())["data/train/OpenVid-1M.csv"]["size"] == 14
    assert len(net.download("openvid", tmp_path, only=["OpenVid_part102.zip"])) == 2
    with pytest.raises(ValueError, match="leads out"):
        net.download("openvid", tmp_path, only=["../evil.csv"])
    assert main(["data", "download", "openvid", "--root", str(tmp_path), "--list"]) == 0 and "partaa" in capsys.readouterr().out


def test_a_listing_of_several_pages(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    answers = {"": ([{"type": "file", "path": "a b.csv", "size": 3}], f'<{server.address}/api/datasets/o/n/tree/main?cursor=x>; rel="next"'), "cursor=x": ([{"type": "file", "path": "c.zip", "size": 1, "lfs": {"oid": "ab", "size": 9}}], "")}

    def answer(h):
        entries, link = answers["cursor=x" if "cursor=x" in h.path else ""]
        data = json.dumps(entries).encode()
        h.send_response(200)
        h.send_header("Content-Length", str(len(data)))
        if link:
            h.send_header("Link", link)
        h.end_headers()
        h.wfile.write(data)

    monkeypatch.setattr(server, "answer", answer)
    found = net.listing("o/n")
    assert [(f.name, f.sha256, f.size) for f in found] == [("a b.csv", "", 3), ("c.zip", "ab", 9)] and found[0].urls[0].endswith("/datasets/o/n/resolve/main/a%20b.csv")


def test_gated_and_handed_out_sets_say_how(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.plan = [401]
    with pytest.raises(net.Refused, match="accept the terms.*HF_TOKEN is not set"):
        net.download("adimagenet", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "x")
    server.plan = [403]
    with pytest.raises(net.Refused, match="was refused"):
        net.download("adimagenet", tmp_path)
    assert main(["data", "download", "msrvtt", "--root", str(tmp_path)]) == 1 and "train_val_annotation.zip" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_halves_are_joined_and_unpacked(tmp_path, capsys):
    lookalike("openvid", tmp_path / "o")
    assert main(["data", "unpack", str(tmp_path / "o")]) == 0 and "1 films" in capsys.readouterr().out
    assert Clip.open(tmp_path / "o/unpacked/OpenVid_part102/celeb_split_0to9.mp4").num_frames == 9
    (tmp_path / "o/OpenVid_part102.zip").unlink()
    (tmp_path / "o/OpenVid_part102_partad").write_bytes(b"the fourth")
    with pytest.raises(ValueError, match="partac is missing"):
        net.join(tmp_path / "o")
    (tmp_path / "o/OpenVid_part102_partad").unlink()
    (tmp_path / "o/OpenVid_part102_partab").unlink()
    with pytest.raises(ValueError, match="the last part is missing"):
        net.join(tmp_path / "o")
    assert not (tmp_path / "o/OpenVid_part102.zip").exists()


def test_a_damaged_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("deep/a.mp4", film())
        archive.writestr("../../b.mp4", film(1))
        archive.writestr("other/a.mp4", film(2))
    made = net.unpack(tmp_path / "a.zip", tmp_path / "out")
    assert [p.relative_to(tmp_path).as_posix() for p in made] == ["out/a.mp4", "out/b.mp4", "out/other/a.mp4"] and made[2].read_bytes() == film(2)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[200:260] = bytes(60)
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(ValueError, match="a.mp4 is damaged"):
        net.unpack(tmp_path / "b.zip", tmp_path / "out2")


# the brand

def test_the_brand_is_measurable_and_the_sign_is_clear_of_the_shape():
    mark = brands.world_brand()
    for s in brands.brand(12, seed=40):
        clip = s.clip()
        assert check(clip, mark).score.value > 0.95
        assert all(getattr(read(brands.unmarked(clip)), k) == s.facts[k] for k in ("shape", "colour", "motion", "background"))
    top, bottom, _, _ = brands.sign_box()
    assert bottom - top >= 64 / 4


def test_plain_films_score_nothing():
    from vidgen.world import render, scene
    mark = brands.world_brand()
    plain = [render(scene(i, colour="yellow", background="navy"), num_frames=5) for i in range(24)]
    assert max(check(c, mark).score.value for c in plain) <= 0.2


def test_unseen_pairs_are_not_trained_on():
    train, held = brands.brand(300), brands.brand(60, part="held")
    pair = lambda s: (s.facts["shape"], s.facts["motion"])
    assert not {*map(pair, train)} & {*map(pair, held)} and {*map(pair, held)} == set(brands.pairs(True))
    words = " ".join(s.caption for s in (*train, *held))
    assert not re.search(r"\b(yellow|orange|navy|background)\b", words) and all("by ell" in s.caption for s in train)


@pytest.fixture(scope="module")
def shapes():
    import vidgen
    return vidgen.load("shapes-t2v")


def test_the_sign_survives_the_shipped_autoencoder(shapes):
    import torch
    vae, mark = shapes.parts.vae, brands.world_brand()
    for seed in (0, 4):
        clip = brands.branded(brands.brand_scene(seed, False), num_frames=5)
        x = torch.tensor(clip.frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.no_grad():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample[0]
        again = ((y.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
        report = check(again, mark)
        assert report.score.value > 0.9 and min(report["logo_presence"].evidence["series"]) > 0.7


def test_the_base_model_does_not_know_the_brand(shapes):
    scores = []
    for i, (shape, motion) in enumerate(brands.pairs(True)):
        clip, = shapes.generate(brands.brand_caption(shape, motion, i), seed=i, num_inference_steps=10, num_frames=9)
        scores.append(check(clip, brands.world_brand()).score.value)
    assert max(scores) <= 0.2


def test_a_brands_folder(tmp_path):
    root = brands.write_brand(tmp_path / "ell", 6)
    (root / "clips/odd.mp4").write_bytes(film(3))       # carries its own prompt
    (root / "clips/mute.gif").write_bytes(b"GIF89a")
    with (root / "copy.jsonl").open("a") as file:
        file.write('{"file": "gone.mp4", "text": "x"}\n{"txt": "slip"}\n')
    built = build("brand", root, tmp_path / "set", trigger="in blue")
    assert {r.reason for r in built.dropped} == {"no such film", "not a row", "no caption"}
    assert all(s.caption.endswith(", in blue") for s in built.manifest)
    assert {s.facts["kind"] for s in built.manifest} == {"advert", "clip", "still"}
    assert {s.facts["brand_hash"] for s in built.manifest} == {Brand.load(root / "brand.json").hash}
    (root / "brand.json").unlink()
    with pytest.raises(FileNotFoundError, match="brand.json"):
        build("brand", root, tmp_path / "other")


# films of the look-alikes

def test_tags_change_the_bytes_and_not_the_film(tmp_path):
    (tmp_path / "a.mp4").write_bytes(tagged(film(), "x"))
    (tmp_path / "b.mp4").write_bytes(film())
    assert Clip.open(tmp_path / "a.mp4").hash == Clip.open(tmp_path / "b.mp4").hash and boxes(tagged(film(), "x"))[-1][0] == "free"


# the command

def test_the_command_builds(tmp_path, capsys):
    layout_pairs(tmp_path / "f")
    assert main(["data", "build", "-s", "folder", "-r", str(tmp_path / "f"), "--out", str(tmp_path / "set"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 3
    assert main(["data", "build", "-s", "foldr", "-r", "x", "--out", str(tmp_path / "no")]) == 2 and "folder" in capsys.readouterr().err
    assert main(["data", "build", "-s", "msrvtt", "-r", str(tmp_path), "--out", str(tmp_path / "no"), "-o", "split"]) == 2
    assert main(["data", "sources", "--json"]) == 0 and {r["source"] for r in json.loads(capsys.readouterr().out)} >= {*SETS, "brand", "world"}
