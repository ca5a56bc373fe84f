"""Data files as they lie on people's disks: what a file holds counts, and values stay as they are written."""

import base64
import csv
import datetime
import gzip
import io
import json
import subprocess
import sys
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlcs.data import files, loading
from rlcs.errors import DataError
from rlcs.recipe.schema import Data


def load(source, role="rl", **settings):
    return loading.load(str(source), Data(**settings), decode_limit=10**7, role=role)


def golds(source, role="rl", **settings):
    loaded = load(source, role, **settings)
    assert not loaded.bad, loaded.bad
    return [row.problem.answer for row in loaded.rows]


def rows(*answers):
    return [{"question": "q", "answer": answer} for answer in answers]


def lines(*answers):
    return "\n".join(map(json.dumps, rows(*answers)))


LISTED = rows("1", "2")
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "7"}]}


# ------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.json", lines("1", "2"), ["1", "2"]),
        ("rows.json", "\n\n" + lines("1", "2") + "\n", ["1", "2"]),
        ("rows.json", json.dumps(LISTED[0]), ["1"]),
        ("rows.json", json.dumps(LISTED[0], indent=2), ["1"]),
        ("rows.json", json.dumps(SHARED, indent=2), ["7"]),
        ("rows.json", json.dumps(LISTED), ["1", "2"]),
        ("rows.json", json.dumps(LISTED, indent=2), ["1", "2"]),
        ("rows.json", "[]", []),
        ("rows.json", json.dumps({"version": "1", "data": LISTED}), ["1", "2"]),
        ("rows.json", json.dumps({"info": {}, "questions": LISTED}, indent=1), ["1", "2"]),
        ("rows.json", json.dumps({"7": LISTED[0], "8": LISTED[1]}), ["1", "2"]),
        ("rows.jsonl", json.dumps(LISTED), ["1", "2"]),
        ("rows.jsonl", json.dumps(LISTED, indent=2), ["1", "2"]),
        ("rows.ndjson", lines("1", "2"), ["1", "2"]),
        ("rows.JSON", lines("1", "2"), ["1", "2"]),
        ("rows.json", lines("007", "1.50", "2024-05-01"), ["007", "1.50", "2024-05-01"]),
    ],
)
@pytest.mark.parametrize("form", ["plain", "bom", "gz", "gz without its name", "plain named gz"])
def test_the_content_of_a_json_file_counts_and_not_its_name(tmp_path, name, content, expected, form):
    path = tmp_path / (f"{name}.gz" if form in ("gz", "plain named gz") else name)
    data = content.encode("utf-8-sig" if form == "bom" else "utf-8")
    path.write_bytes(gzip.compress(data) if form.startswith("gz") else data)
    assert golds(path) == expected


def test_a_mapping_of_rows_gives_them_their_ids(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"x7": LISTED[0], "x8": {**LISTED[1], "id": "own"}}))
    assert [row.problem.id for row in load(tmp_path / "rows.json").rows] == ["x7", "own"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"train": LISTED, "test": LISTED}), "several lists: train, test"),
        ("{}", "holds one dict"),
        ("", "the file is empty"),
        ("hello", "no list of rows"),
        ('[{"question": "q"}, {"quest', "not valid JSON in row 1"),
        ('[{"question": "q"} {}]', "not valid JSON after row 0"),
        ('[{"question": "q"}', "not valid JSON after row 0"),
        ("[] []", "more after the list"),
        ("[" * 100_000, "not valid JSON in row 0"),
        ('{"question": \n "q', "not valid JSON"),
    ],
)
def test_a_json_file_that_cannot_be_read_says_where_it_ends(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "rows.json")
    assert "\n  -> " in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.fault("data", "a packed file cut off, another encoding", "named")
def test_a_packed_file_that_is_cut_off_and_another_encoding_are_named(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines("1", "2").encode())[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "rows.jsonl.gz")
    for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        (tmp_path / "rows.jsonl").write_bytes(lines("1").encode(code))
        with pytest.raises(DataError, match="UTF-16"):
            load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    with pytest.raises(DataError, match=r"pointer of Git LFS .*\n.*git lfs pull"):
        load(tmp_path / name)


# ------------------------------------------------------------------------------ tables


def picture(size=(40, 30), kind="PNG"):
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_cells_of_a_table_stay_text_and_empty_ones_are_null(tmp_path):
    (tmp_path / "img.png").write_bytes(base64.b64decode(picture()))
    content = (
        "\ufeffquestion,image,answer,options,level\r\n"
        '"How ""many"",\r\nreally?",img.png,007,,1\r\n'
        "q2,,1.50,,\r\n"
        "\r\n"
        'q3,,B,"[""10"", ""12""]",\r\n'
        "q4,,2024-05-01,,x\r\n"
    )
    (tmp_path / "rows.csv").write_bytes(content.encode())
    loaded = load(tmp_path / "rows.csv")
    assert not loaded.bad
    first, *_ = problems = [row.problem for row in loaded.rows]
    assert [p.answer for p in problems] == ["007", "1.50", "B", "2024-05-01"]
    assert (first.question, len(first.images), first.metadata) == (
        'How "many",\r\nreally?',
        1,
        {"level": "1"},
    )
    assert problems[2].choices == ("10", "12")
    assert [p.id for p in problems] == ["2", "4", "6", "7"]


@pytest.mark.parametrize(("name", "mark"), [("r.csv", ","), ("r.csv", ";"), ("r.csv", "\t"), ("r.tsv", "\t")])
def test_the_separator_is_seen_in_the_first_line(tmp_path, name, mark):
    (tmp_path / name).write_text(f"question{mark}answer\nq{mark}3\n")
    assert golds(tmp_path / name) == ["3"]


def test_a_cell_may_hold_an_image_of_megabytes_and_the_limit_of_other_code_stays(tmp_path):
    image = picture((700, 500), "BMP")
    assert len(image) > 1_000_000
    (tmp_path / "rows.tsv").write_text(f"question\timage\tanswer\nq\t{image}\t1\n")
    csv.field_size_limit(131_072)
    (row,) = load(tmp_path / "rows.tsv").rows
    assert row.problem.images[0].width == 700 and csv.field_size_limit() == 131_072


def test_an_empty_cell_is_no_response(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer,response\nq,1,\nr,2,so \\boxed{2}\n")
    loaded = load(tmp_path / "rows.csv", "cold_start")
    assert [row.response for row in loaded.rows] == [None, "so \\boxed{2}"]


def test_a_faulty_line_of_a_table_is_a_bad_row(tmp_path):
    content = b'question,answer\nq,1\nshort\nq\xe9,2\nlong,2,3\nq,4\n"open,5\n'
    (tmp_path / "rows.csv").write_bytes(content)
    loaded = load(tmp_path / "rows.csv")
    assert [row.problem.answer for row in loaded.rows] == ["1", "4"]
    reasons = {bad.where.rpartition(":")[2]: bad.reason for bad in loaded.bad}
    assert "1 cells in a table of 2 columns" in reasons["3"] and "3 cells" in reasons["5"]
    assert "not UTF-8" in reasons["4"] and "quote" in reasons["7"]


def test_the_first_line_names_the_columns(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer,answer\nq,1,2\n")
    with pytest.raises(DataError, match="two columns are named 'answer'"):
        load(tmp_path / "rows.csv")
    pq.write_table(
        pa.Table.from_arrays([pa.array(["q"])] * 3, names=["question", "answer", "answer"]),
        tmp_path / "rows.parquet",
    )
    with pytest.raises(DataError, match="two columns are named 'answer'"):
        load(tmp_path / "rows.parquet")
    for header in ("question,réponse".encode("latin-1"), b"quest\x1bion,answer"):
        (tmp_path / "rows.csv").write_bytes(header + b"\nq,1\n")
        with pytest.raises(DataError, match="first line is not text in UTF-8"):
            load(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text(f"q,1,{picture((200, 200))}\n")
    with pytest.raises(DataError, match="no question column") as caught:
        load(tmp_path / "rows.csv")
    assert len(str(caught.value)) < 500


def test_dates_times_and_decimals_of_a_parquet_file_are_plain_text(tmp_path):
    moment = datetime.datetime(2024, 5, 1, 13, 30)
    for values, expected in (
        (pa.array([datetime.date(2024, 5, 1)]), "2024-05-01"),
        (pa.array([datetime.datetime(2024, 5, 1)], pa.timestamp("ns")), "2024-05-01"),
        (pa.array([moment], pa.timestamp("us")), "2024-05-01 13:30:00"),
        (pa.array([datetime.time(13, 30)]), "13:30:00"),
        (pa.array([Decimal("1000000.50")]), "1000000.5"),
        (pa.array([3.0]), "3"),
        (pa.array([0.1], pa.float32()), "0.1"),
    ):
        pq.write_table(pa.table({"question": ["When?"], "answer": values}), tmp_path / "rows.parquet")
        assert golds(tmp_path / "rows.parquet") == [expected]


# ------------------------------------------------------------------------------ folders


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_folder_is_read_as_its_file_is(tmp_path):
    fill(tmp_path, {"train.jsonl": lines("2024-05-01", "007", "1.50", "12:30:00")})
    assert golds(tmp_path) == ["2024-05-01", "007", "1.50", "12:30:00"]
    fill(tmp_path / "table", {"train.csv": "question,answer\nq,2024-05-01\n"})
    assert golds(tmp_path / "table") == ["2024-05-01"]


def test_the_names_of_files_say_which_split_they_are(tmp_path):
    files = {"train-00000-of-00002.jsonl": lines("1"), "train-00001-of-00002.jsonl": lines("2")}
    fill(tmp_path, {**files, "test/rows.jsonl": lines("3"), "val.jsonl": lines("4"), ".hidden.jsonl": "x"})
    loaded = load(tmp_path)
    assert [row.problem.answer for row in loaded.rows] == ["1", "2"]
    assert [row.problem.id for row in loaded.rows] == ["0", "1"]
    assert loaded.notes == (
        "rows are read from 2 files: train-00000-of-00002.jsonl, train-00001-of-00002.jsonl",
    )
    assert golds(tmp_path, "test") == ["3"]
    assert golds(f"{tmp_path}?split=validation") == golds(tmp_path, split="validation") == ["4"]
    with pytest.raises(DataError, match=r"no split dev\n.*test, train, validation"):
        load(f"{tmp_path}?split=dev")


def test_a_folder_whose_names_have_no_split_is_data_of_every_role(tmp_path):
    fill(tmp_path, {"a.csv": "question,answer\nq,1\n", "b.csv": "question;answer\nq;2\n"})
    assert golds(tmp_path) == golds(tmp_path, "test") == ["1", "2"]
    fill(tmp_path, {"c.jsonl": lines("3")})
    with pytest.raises(DataError, match=r"several kinds: a\.csv, b\.csv, c\.jsonl"):
        load(tmp_path)


def test_images_are_found_beside_their_file_below_the_folder_and_below_the_image_root(tmp_path):
    image = base64.b64decode(picture())
    for place in ("set/data/a.png", "set/b.png", "elsewhere/c.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(image)
    content = "\n".join(json.dumps({**LISTED[0], "image": f"{name}.png"}) for name in "abc")
    fill(tmp_path / "set" / "data", {"train.jsonl": content})
    loaded = load(tmp_path / "set", image_root=str(tmp_path / "elsewhere"))
    assert [len(row.problem.images) for row in loaded.rows] == [1, 1, 1]
    (bad,) = load(tmp_path / "set").bad
    assert "data.image_root" in bad.reason


def test_the_command_reads_a_folder_and_lines_that_are_named_json(tmp_path):
    folder = fill(tmp_path / "folder", {"train.jsonl": lines("2024-05-01")})
    path = fill(tmp_path, {"rows.json": lines("1", "2")}) / "rows.json"
    for source, expected in ((folder, "1 row"), (path, "2 row")):
        command = [sys.executable, "-m", "rlcs", "data", "check", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 and f"{expected}" in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------------------------ limits


@pytest.fixture
def short_lines(monkeypatch):
    """Limits of 1,000 and 5,000 bytes."""
    monkeypatch.setattr(files, "LONGEST_LINE", 1_000)
    monkeypatch.setattr(files, "LARGEST_TEXT", 5_000)


@pytest.mark.fault(
    "limits", "a line longer than fits in memory", "left out with its number; the others are read"
)
@pytest.mark.parametrize("length", [1_000, 1_001, 2_000, 2_001, 4_500])
@pytest.mark.parametrize("end", ["", "\n", "\n" + lines("2")])
def test_a_line_that_is_too_long_is_left_out_unread(length, end, short_lines, tmp_path):
    long = json.dumps({"question": "q", "answer": "1", "x": ""})
    long = long.replace('""', f'"{"y" * (length - len(long))}"')
    (tmp_path / "rows.jsonl").write_text(f"{lines('0')}\n{long}{end}\n")
    loaded = load(tmp_path / "rows.jsonl", max_bad_share=1.0)
    assert [row.problem.answer for row in loaded.rows] == ["0", *(["2"] if "2" in end else [])]
    assert [bad.where for bad in loaded.bad] == [f"{tmp_path}/rows.jsonl:2"]
    assert "longer than 1,000 bytes" in str(loaded.bad[0])


@pytest.mark.fault("limits", "a JSON text larger than fits in memory", "a sentence that says what to write")
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_text_that_is_too_large_is_a_sentence(indent, short_lines, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(rows(*"1234" * 100), indent=indent))
    with pytest.raises(DataError, match=r"larger than 5,000 bytes(?s:.*)one object a line"):
        load(tmp_path / "rows.json")


@pytest.mark.fault("limits", "a cell longer than fits in memory, a quote that never ends", "a bad row")
def test_a_cell_that_is_too_long_is_a_bad_row(short_lines, tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\nq,1\nq," + "2" * 3_000 + "\nq,3\n")
    loaded = load(tmp_path / "rows.csv", max_bad_share=1.0)
    assert "1" in [row.problem.answer for row in loaded.rows] and loaded.bad


@pytest.mark.fault("limits", "a sparse file of 20 GB", "a sentence after 1 GB, in 0.4 GB of memory")
def test_a_hole_takes_no_memory(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines("1") + "\n")
    with path.open("r+b") as file:
        file.truncate(20 << 30)
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (400 << 20, 400 << 20));"
        "from pathlib import Path; from rlcs.data import files;"
        "files.LONGEST_LINE, files.LARGEST_TEXT = 1 << 23, 1 << 26;"
        f"list(files.read_file(Path({str(path)!r}))[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DataError" in done.stderr and "a line has more than 67,108,864 bytes" in done.stderr, done.stderr
