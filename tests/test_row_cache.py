"""The rows of a large source lie on disk once they were read, and are those that one reading gives."""

import base64
import csv
import gc
import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from rlcs.data import row_cache, scan
from rlcs.data.difficulty import stream_of
from rlcs.data.files import RawRow
from rlcs.data.loading import load, load_indexed
from rlcs.data.overlap import OverlapFinder
from rlcs.data.rows import Row, RowReader
from rlcs.data.run_data import by_pass_rate, hold_out, load_run_data
from rlcs.data.stored import (
    Stored,
    all_answered,
    digests_of,
    number_blind,
    problems_of,
    rows_of,
    with_images_among,
    with_most_pixels,
    without,
)
from rlcs.errors import DataError, RunFolderError
from rlcs.pipeline.data_checks import check_prompts, count_prompts
from rlcs.pipeline.inputs import check_inputs
from rlcs.progress import ROWS_SAID_S, RowProgress
from rlcs.recipe.schema import Data, Recipe
from rlcs.storage import MANIFEST

COUNT = 120
DATA = Data()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own, in which sources of 40 rows count as large."""
    monkeypatch.setenv("RLCS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "_CHUNK_ROWS", 20)
    monkeypatch.setattr(scan, "_MIN_CHUNKS", 2)
    monkeypatch.setattr(scan, "LARGE", 40)
    monkeypatch.setattr(scan, "usable_cores", lambda: 1)  # to start processes takes seconds
    return tmp_path / "cache" / "rows"


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (30 + number % 7, 20), (number % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(folder):
    """Rows with image files, embedded images, several images and none, histories, choices, and bad ones."""
    for number in range(COUNT):
        row = {
            "id": f"r{number}",
            "question": f"How many of {number}?",
            "answer": str(number),
            "level": number % 3,
        }
        if number % 4 == 1:
            (folder / f"{number}.png").write_bytes(png(number))
            row["images"] = [f"{number}.png"]
        if number % 4 == 2:
            row["images"] = [base64.b64encode(png(number)).decode(), base64.b64encode(png(1)).decode()]
        if number % 5 == 0:
            row |= {"choices": ["1", "2", "3"], "answer": "B"}
        if number % 9 == 0:
            row["pass_rate"] = number / COUNT
        if number == 17:
            row["answer"] = r"\boxed{17}"
        if number == 50:
            row["id"] = "r3"  # again
        if number == 61:
            row["question"] = ""
        if number == 63:
            row = {"id": "talk", "messages": [
                {"role": "system", "content": "Be brief. \u00fc"}, {"role": "user", "content": "Hi\n"},
                {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And 3 + 4?"},
                {"role": "assistant", "content": "7"},
            ]}  # fmt: skip
        yield row


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(tmp_path)))
    return path


def held(source, role="rl", settings=DATA):
    return load(str(source), settings, decode_limit=10**6, role=role)


def indexed(source, role="rl", settings=DATA):
    return load_indexed(str(source), settings, decode_limit=10**6, role=role)


def same(stored, plain):
    """Whether rows are alike but for the place of embedded images."""

    def seen(row):
        images = [(ref.sha256, ref.width, ref.height) for ref in row.problem.images]
        return (
            row.problem.digest,
            images,
            {name: getattr(row, name) for name in Row.__slots__ if name != "problem"},
            row.problem.id,
            row.problem.source,
            row.problem.metadata,
            row.problem.history,
            row.problem.choices,
        )

    return [*map(seen, stored)] == [*map(seen, plain)]


@pytest.mark.parametrize("cores", [1, 2])
def test_rows_on_disk_are_those_in_memory(source, monkeypatch, cores):
    monkeypatch.setattr(scan, "usable_cores", lambda: cores)
    plain, stored = held(source), indexed(source)
    assert isinstance(stored.rows, Stored) and isinstance(plain.rows, tuple)
    assert len(stored.rows) == len(plain.rows) == COUNT - 2
    assert same(stored.rows, plain.rows)
    assert (tuple(stored.bad), stored.notes) == (tuple(plain.bad), plain.notes)
    assert all(ref.path and ref.data is None for row in stored.rows for ref in row.problem.images)
    embedded = next(row for row in stored.rows if row.problem.id == "r2").problem.images[0]
    assert Path(embedded.path).read_bytes() == png(2)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder"])
def test_every_kind_of_file(tmp_path, kind):
    table = [{"id": str(n), "question": f"What is {n}?", "answer": f"{n}"} for n in range(COUNT)]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(table))
    elif kind == "csv":
        with path.open("w") as file:
            writer = csv.DictWriter(file, ["id", "question", "answer"])
            writer.writeheader()
            writer.writerows(table)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        for part in range(2):
            lines = (json.dumps(row) + "\n" for row in table[part::2])
            (path / f"train-{part}.jsonl").write_text("".join(lines))
    stored = indexed(path)
    assert isinstance(stored.rows, Stored) and same(stored.rows, held(path).rows)
    assert stored.notes == held(path).notes


def test_a_small_source_is_held(tmp_path, cache):
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": "1"}) + "\n" for n in range(20)))
    assert isinstance(indexed(path).rows, tuple) and not cache.exists()


def test_the_second_start_reads_no_row_and_holds_none(source, monkeypatch):
    first = indexed(source)
    monkeypatch.setattr(RowReader, "read", None)
    again = indexed(source)
    assert (again.bad, again.notes) == (first.bad, first.notes)
    gc.collect()
    before = sum(isinstance(each, Row) for each in gc.get_objects())
    numbers = [len(row.problem.id) for row in again.rows]
    assert len(numbers) == COUNT - 2
    assert sum(isinstance(each, Row) for each in gc.get_objects()) <= before + 1


def edited(source, tmp_path):
    """Another gold answer, with the size and the time of before."""
    times = source.stat()
    source.write_text(source.read_text().replace('"answer": "21"', '"answer": "12"'))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))


def another_image(source, tmp_path):
    (tmp_path / "5.png").write_bytes(png(6))


def lost_image(source, tmp_path):
    (tmp_path / "5.png").unlink()


def replaced_image(source, tmp_path):
    """Another image with the size and the time of before, as `rsync` puts it there."""
    path, new = tmp_path / "5.png", tmp_path / "new"
    times = path.stat()
    new.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(path)


@pytest.mark.parametrize("change", [edited, another_image, lost_image, replaced_image])
def test_a_change_is_seen(source, tmp_path, change):
    before = [row.problem.digest for row in indexed(source).rows]
    change(source, tmp_path)
    after = indexed(source)
    assert [row.problem.digest for row in after.rows] != before
    assert same(after.rows, held(source).rows)


@pytest.mark.parametrize("before", [None, b"junk"])
def test_an_image_that_is_put_right_is_seen(source, tmp_path, before):
    good = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").unlink()
    if before:
        (tmp_path / "5.png").write_bytes(before)
    assert [bad.id for bad in indexed(source).bad].count("r5") == 1
    (tmp_path / "5.png").write_bytes(good)
    again = indexed(source)
    assert len(again.rows) == COUNT - 2 and same(again.rows, held(source).rows)


def test_images_of_another_folder_are_seen(source, tmp_path):
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        for number in range(COUNT):
            (tmp_path / name / f"other-{number}.png").write_bytes(png(number + (name == "v2")))
    table = [{"question": f"{n}?", "answer": "1", "images": [f"other-{n}.png"]} for n in range(COUNT)]
    source.write_text("".join(json.dumps(row) + "\n" for row in table))
    root = tmp_path / "root"
    root.symlink_to(tmp_path / "v1")
    settings = Data(image_root=str(root))
    indexed(source, settings=settings)
    root.unlink()
    root.symlink_to(tmp_path / "v2")
    found = indexed(source, settings=settings).rows
    assert isinstance(found, Stored) and same(found, held(source, settings=settings).rows)


def test_an_index_that_is_out_of_date_stays_with_those_that_have_it_open(source, tmp_path):
    first = indexed(source).rows
    another_image(source, tmp_path)
    second = indexed(source).rows
    embedded = [ref for rows_ in (first, second) for row in rows_ for ref in row.problem.images
                if "cache" in ref.path]  # fmt: skip
    assert len(embedded) > 100 and all(Path(ref.path).exists() for ref in embedded)
    assert same(indexed(source).rows, second)


def test_a_saved_data_set_that_is_edited_in_place(tmp_path):
    import datasets

    def saved(folder, answer):
        table = [{"question": f"{n}?", "answer": answer} for n in range(60)]
        datasets.Dataset.from_list(table).save_to_disk(str(folder))

    saved(tmp_path / "data", "1")
    saved(tmp_path / "other", "2")
    assert isinstance(indexed(tmp_path / "data").rows, Stored)
    for file in (tmp_path / "other").glob("*.arrow"):
        file.replace(tmp_path / "data" / file.name)
    assert indexed(tmp_path / "data").rows[0].problem.answer == "2"


def test_large_rows_count_by_their_bytes(monkeypatch):
    rows_ = [
        RawRow(where="", number=n, fields={"image": {"bytes": b"x" * 1000}, "q": ["y"]}) for n in range(30)
    ]
    monkeypatch.setattr(scan, "_CHUNK_BYTES", 5000)
    large, same_rows = scan.is_large(iter(rows_))
    assert large and list(same_rows) == rows_
    large, same_rows = scan.is_large(iter(rows_[:9]))
    assert not large and list(same_rows) == rows_[:9]


def test_other_settings_read_anew_and_choices_among_rows_do_not(source, cache):
    indexed(source)
    indexed(source, settings=Data(max_bad_share=0.5, overlap="drop", test="other.jsonl"))
    assert len(list(cache.glob(f"*/{MANIFEST}"))) == 1
    assert same(indexed(source, settings=Data(answers="as_given")).rows,
                held(source, settings=Data(answers="as_given")).rows)  # fmt: skip
    indexed(source, role="cold_start")
    assert len(list(cache.glob(f"*/{MANIFEST}"))) == 3


def test_questions_about_all_rows_have_the_answers_of_rows_in_memory(source):
    plain, stored = held(source).rows, indexed(source).rows
    problems, on_disk = problems_of(plain), problems_of(stored)
    assert isinstance(on_disk, Stored)
    assert digests_of(on_disk) == digests_of(problems) and len(digests_of(problems)) == 8 * len(problems)
    assert number_blind(on_disk) == number_blind(problems) > 0
    assert [p.id for p in with_images_among(on_disk)] == [p.id for p in problems if p.images]
    assert [p.id for p in with_most_pixels(on_disk, 5)] == [p.id for p in with_most_pixels(problems, 5)]
    left = without(on_disk, {"r2", "r99", "no such row"})
    assert [p.id for p in left] == [p.id for p in without(problems, {"r2", "r99"})]
    assert len(left) == len(problems) - 2
    assert without(on_disk, ()) is on_disk
    for part in zip(hold_out(on_disk, 10, ""), hold_out(problems, 10, ""), strict=True):
        assert [p.id for p in part[0]] == [p.id for p in part[1]]
    chosen = Data(rl_pass_rate=(0.2, 0.7))
    assert [p.id for p in by_pass_rate(on_disk, chosen)] == [p.id for p in by_pass_rate(problems, chosen)]
    with pytest.raises(DataError, match="13 of 118 have one"):
        by_pass_rate(on_disk, Data(rl_pass_rate=(0.001, 0.002)))
    assert left[-1].id == problems[-1].id and left[3:5][0].id == left[3].id


def test_demonstrations_know_their_responses(tmp_path):
    path = tmp_path / "demos.jsonl"

    def write(last):
        table = [{"question": f"{n}?", "answer": "1", "response": f"<think>{n}</think> 1"} for n in range(60)]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*table, last]))

    write({"question": "60?", "answer": "1", "response": "1"})
    stored, plain = indexed(path, "cold_start").rows, held(path, "cold_start").rows
    assert all_answered(stored) and all_answered(plain) and digests_of(stored) == digests_of(plain)
    write({"question": "60?", "answer": "1"})
    again = indexed(path, "cold_start").rows
    assert not all_answered(again) and digests_of(again) != digests_of(stored)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_of_a_source(source, part):
    stored, plain = (f(f"{source}?part={part}") for f in (indexed, held))
    assert isinstance(stored.rows, Stored) and same(stored.rows, plain.rows) and stored.notes == plain.notes
    assert 0 < len(stored.rows) < COUNT - 2


def test_the_order_of_training_is_the_same(source):
    takes = []
    for rows_ in (held(source).rows, indexed(source).rows):
        stream = stream_of(problems_of(rows_), "shuffled", seed=3, steps=10)
        first = [problem.id for problem in stream.take(100)]
        seen = [problem.id for problem in stream.peek(40)]  # beyond the end of the epoch
        state = stream.state()
        assert [problem.id for problem in stream.take(40)] == seen
        stream.restore(state)
        takes.append([*first, *(problem.id for problem in stream.take(40))])
        assert takes[-1][100:] == seen
    assert takes[0] == takes[1]


def test_a_run_compares_and_counts_once(source, tmp_path, monkeypatch):
    other = tmp_path / "test.jsonl"
    lines = source.read_text().splitlines()
    other.write_text("\n".join([lines[8], lines[25], lines[30]]) + "\n")
    recipe = Recipe(data=Data(rl=str(source), test=str(other), overlap="drop", max_bad_share=0.1))
    recipe = recipe.model_copy(update={"study": recipe.study.model_copy(update={"arms": ("base", "grpo")})})

    def start():
        data = load_run_data(recipe.study, recipe.data, decode_limit=10**6, validation=recipe.validation)
        checked = check_prompts(data, recipe)
        check_inputs(tmp_path / "run", checked, recipe.model.name)
        return checked

    first = start()
    assert isinstance(first.rl, Stored) and not {"r8", "r25", "r30"} & {problem.id for problem in first.rl}
    monkeypatch.setattr("rlcs.data.run_data.OverlapFinder", None)
    counted = []
    monkeypatch.setattr("rlcs.pipeline.data_checks.long_prompts",
                        lambda rows, *_: counted.append(len(rows)) or ([], 5))  # fmt: skip
    second = start()
    assert [problem.id for problem in second.rl] == [problem.id for problem in first.rl]
    assert second.notes == first.notes and second.checks["overlap"] == first.checks["overlap"]
    assert max(counted) <= 3, "only the small source is counted again"
    changed = recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update={"system": "Think."})})
    count_prompts(rows_of(second.rl), "rl", changed)
    assert max(counted) == len(second.rl), "other prompts are counted"
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "predictions.jsonl").write_text("{}\n")
    edited(source, tmp_path)
    monkeypatch.setattr("rlcs.data.run_data.OverlapFinder", OverlapFinder)
    with pytest.raises(RunFolderError, match=r"1 rows .*first 'r21'"):
        start()


def test_rows_are_held_where_the_cache_cannot_be_written(source, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLCS_CACHE", str(tmp_path / "file"))
    found = indexed(source)
    assert isinstance(found.rows, tuple) and same(found.rows, held(source).rows)
    assert "rows.jsonl is held in memory, as its rows cannot be written to disk" in caplog.text


def test_rows_are_held_where_the_disk_is_full(source, cache, monkeypatch, caplog):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_cache.RowIndexWriter, "_flush", full)
    assert isinstance(indexed(source).rows, tuple)
    assert "No space left on device" in caplog.text and not list(cache.glob("**/*.jsonl"))


def test_what_a_killed_process_left_is_not_used_and_removed(source, cache):
    stored = indexed(source)
    finished = next(cache.glob(f"*/{MANIFEST}")).parent
    left = cache / f".building-{finished.stem}-1"
    left.mkdir()
    (left / "rows.jsonl").write_text("{}")
    (finished / MANIFEST).unlink()  # as it is until the last moment
    again = indexed(source)
    assert same(again.rows, stored.rows) and finished.exists(), "one that is open stays"
    assert next(cache.glob(f"*/{MANIFEST}")).parent.name == f"{finished.stem}.2" and not left.exists()


def shorter_column(index):
    (index / "columns" / "pixels").write_bytes(b"\0" * 9)


def half_the_rows(index):
    content = (index / "rows.jsonl").read_bytes()
    (index / "rows.jsonl").write_bytes(content[: len(content) // 2])


def an_image_less(index):
    next((index / "images").iterdir()).unlink()


def an_empty_image(index):
    next((index / "images").iterdir()).write_bytes(b"")


def empty_manifest(index):
    (index / MANIFEST).write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [shorter_column, half_the_rows, an_image_less, an_empty_image, empty_manifest]
)
def test_a_damaged_index_is_made_again(source, cache, damage):
    stored = [row.problem.digest for row in indexed(source).rows]
    damage(next(cache.glob("*.1")))
    again = indexed(source).rows
    assert isinstance(again, Stored) and [row.problem.digest for row in again] == stored
    assert all(Path(ref.path).exists() for row in again for ref in row.problem.images)


def test_unused_indices_are_removed_when_another_is_written(source, tmp_path, cache):
    def age(folder, days):
        old = time.time() - 86400 * days
        os.utime(folder / MANIFEST, (old, old))

    kept = indexed(source)
    opened = next(cache.glob(f"*/{MANIFEST}")).parent
    age(opened, row_cache.UNUSED_DAYS + 1)
    for name, days, place in [("a.1", 31, ""), ("b.1", 29, ""), ("c.1", 2, "same"), ("d.1", 0.5, "same")]:
        (cache / name).mkdir()
        (cache / name / "rows.jsonl").write_text("")
        (cache / name / MANIFEST).write_text(json.dumps({"place": place}))
        age(cache / name, days)
    (cache / "broken.1").mkdir()
    (cache / "broken.1" / "rows.jsonl").write_text("")
    row_cache._remove_unused(cache, "same")
    assert sorted(folder.name for folder in cache.glob("*.[0-9]*")) == sorted(["b.1", "d.1", opened.name])
    assert kept.rows[0].problem.id == "r0", "one that is open stays"
    del kept
    gc.collect()
    row_cache._remove_unused(cache, "same")
    assert not opened.exists()


def test_one_process_reads_and_the_others_wait(source, monkeypatch):
    read = []
    original = row_cache.RowCache._write

    def slowly(self, *arguments):
        read.append(1)
        time.sleep(0.3)
        return original(self, *arguments)

    monkeypatch.setattr(row_cache.RowCache, "_write", slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(indexed(source))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 1 and len(found) == 3 and same(found[0].rows, found[2].rows)


def test_a_file_that_changes_while_it_is_read_is_refused(source, cache, monkeypatch):
    original = row_cache.scan

    def grown(*arguments):
        scanner = original(*arguments)
        with source.open("a") as file:
            file.write("\n")
        return scanner

    monkeypatch.setattr(row_cache, "scan", grown)
    with pytest.raises(DataError, match="has changed while it was read"):
        indexed(source)
    assert not list(cache.glob(f"*/{MANIFEST}"))


def test_odd_pass_rates(tmp_path):
    path = tmp_path / "rows.jsonl"
    rates = [10**400, True, "0.5", None, 0.5, -1]
    table = [{"question": f"{n}?", "answer": "1", "pass_rate": rates[n % 6]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    settings = Data(rl_pass_rate=(0.1, 1.0))
    stored, plain = (problems_of(f(path).rows) for f in (indexed, held))
    ids = [problem.id for problem in by_pass_rate(plain, settings)]
    assert ids == [problem.id for problem in by_pass_rate(stored, settings)]
    assert len(ids) == 20


def test_long_reading_is_said_with_its_rate():
    said, now = [], [0.0]

    class View:
        def say(self, text):
            said.append(text)

    progress = RowProgress(View(), "rows read", clock=lambda: now[0])
    for number in range(1, 8):
        progress("rl", 10_000 * number)
        now[0] += 0.45 * ROWS_SAID_S
    assert said == ["rl: 40,000 rows read, 2,222/s", "rl: 70,000 rows read, 2,222/s"]
