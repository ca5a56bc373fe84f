"""Files: what a crash, a full disk or a hostile path may do, and what it may not."""

import json
import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import seal
from rlcs import storage
from rlcs.errors import CheckpointError, DataError, RunFolderError

# ------------------------------------------------------------------------------ writing


def test_atomic_write_replaces_makes_folders_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new folder" / "ünï.txt"
    storage.atomic_write(path, "old")
    storage.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_write_works_for_the_longest_name_a_folder_takes(tmp_path):
    path = tmp_path / ("x" * 255)
    storage.atomic_write(path, "content")
    assert path.read_text() == "content"


@pytest.mark.fault("storage", "a full disk while a file is replaced", "the old file stays; a sentence")
def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "weights.bin"
    storage.atomic_write(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunFolderError, match=r"cannot write 5,000 bytes.*\n.*bytes are free") as caught:
            storage.atomic_write(path, b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match="taken"):
        storage.atomic_write(tmp_path / "taken" / "x.json", "{}")


KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from rlcs import storage
path, point = Path(sys.argv[1]), int(sys.argv[2])
seen = 0
def kill_at(event, args):
    global seen
    if event in ("open", "os.rename", "os.remove") and str(path.parent) in str(args[0]):
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
sys.addaudithook(kill_at)
storage.atomic_write(path, b"new" * 100)
"""


@pytest.mark.fault("kills", "SIGKILL at any point of one write", "the old file or the new one")
def test_a_kill_at_any_point_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "state.json"
    outcomes = []
    for point in range(10):
        path.write_bytes(b"old" * 100)
        run = subprocess.run([sys.executable, "-c", KILLED_WRITE, str(path), str(point)], check=False)
        outcomes.append(path.read_bytes())
        if run.returncode == 0:
            break
    assert run.returncode == 0
    assert set(outcomes) == {b"old" * 100, b"new" * 100}


def test_json_goes_out_and_comes_back(tmp_path):
    content = {"a": [1, 2.5, None, True], "b": "\u2028 ü \ud800"}
    storage.write_json(tmp_path / "x.json", content)
    assert storage.read_json(tmp_path / "x.json") == content


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "x.json", {"loss": float("nan")})


@pytest.mark.fault("storage", "a damaged JSON file", "a sentence with the file")
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"", b"[" * 100_000])
def test_broken_json_names_the_file(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: not valid JSON"):
        storage.read_json(tmp_path / "x.json")


def test_the_home_folder_is_found_and_an_unknown_user_s_is_no_error(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(storage.at_home("~/data.jsonl")) == "/home/me/data.jsonl"
    assert str(storage.at_home("~nobody-of-this-name/x")) == "~nobody-of-this-name/x"


def test_reading_opens_no_pipe_and_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="not a regular file"):
        storage.read_json(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="a folder"):
        storage.read_json(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        storage.read_json(tmp_path / "absent.json")


# ------------------------------------------------------------------------------ JSONL

json_rows = st.lists(
    st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(-(10**9), 10**9), st.none()))
)


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(json_rows, max_size=4))
def test_jsonl_goes_out_and_comes_back(tmp_path_factory, batches):
    path = tmp_path_factory.mktemp("j") / "x.jsonl"
    storage.append_jsonl(path, [])
    for rows in batches:
        storage.append_jsonl(path, rows)
    assert storage.read_jsonl(path) == [row for rows in batches for row in rows]


@pytest.mark.fault("storage", "a file of rows cut at any byte", "its last row alone is lost")
def test_jsonl_cut_at_any_byte_loses_only_its_last_row_and_can_be_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "text": "ä\n" * i} for i in range(3)]
    storage.append_jsonl(path, rows)
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        whole = storage.read_jsonl(path)
        assert whole == rows[: len(whole)]
        assert len(whole) >= content[:cut].count(b"\n")
        storage.append_jsonl(path, [{"step": "next"}])
        assert storage.read_jsonl(path) == [*whole, {"step": "next"}]


@pytest.mark.fault("storage", "a full disk while rows are added", "the rows are taken back")
def test_rows_that_do_not_fit_on_the_disk_are_taken_back(tmp_path):
    path = tmp_path / "x.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with storage.JsonlAppender(path) as file:
        file.append([{"a": 1}])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(RunFolderError, match=r"x\.jsonl: cannot write"):
                file.append([{"b": 2}, {"c": "x" * 2000}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == b'{"a": 1}\n'
        file.append([{"d": 4}])
    assert storage.read_jsonl(path) == [{"a": 1}, {"d": 4}]


def test_a_long_torn_tail_is_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 200_000)
    storage.append_jsonl(path, [{"c": 2}])
    assert path.read_bytes() == b'{"a": 1}\n{"c": 2}\n'


def test_a_bad_line_that_is_not_the_torn_last_one_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for content in (b'{"a": 1}\n{"b"\n{"c": 1}\n', b'{"a": 1}\n{"b"\n'):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jsonl:2: torn or invalid JSON"):
            storage.read_jsonl(path)


def test_bom_crlf_blank_lines_and_line_separators_inside_texts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "1\xe2\x80\xa82"}\r\n\r\n{"a": 2}\r\n')
    assert storage.read_jsonl(path) == [{"a": "1\u20282"}, {"a": 2}]
    assert [number for number, _ in storage.jsonl_lines(path)] == [1, 3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "not list"),
        (b'{"a": 1', "column 8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_line_that_is_no_object_says_why(line, reason):
    with pytest.raises(ValueError, match=reason):
        storage.parse_object(line)


# ------------------------------------------------------------------------------ manifests


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step-000001"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "state.json").write_text("{}")
    seal(folder)
    return folder


def test_a_whole_folder_verifies_and_extra_files_do_not_matter(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    storage.verify_manifest(checkpoint)
    seal(checkpoint)
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert set(listed) == {"model/weights.safetensors", "state.json", "notes.txt"}


@pytest.mark.parametrize("name", ["model/weights.safetensors", "state.json"])
def test_every_damage_to_a_file_is_found_and_named(checkpoint, name):
    path = checkpoint / name
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    for damage in (b"", content[: len(content) // 2], content[:-1], content + b"x", flipped):
        path.write_bytes(damage)
        reason = "does not match its checksum" if damage == flipped else f"bytes instead of {len(content):,}"
        with pytest.raises(CheckpointError, match=f"{path.name}: the .*{reason}"):
            storage.verify_manifest(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: the file is missing"):
        storage.verify_manifest(checkpoint)


@pytest.mark.fault("storage", "a damaged or hostile list of files", "refused")
@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": {}}',
        b'{"files": {"state.json": 3}}',
        b'{"files": {"../outside": {"size": 1, "sha256": "0"}}}',
        b'{"files": {"state.json": {"size": "x", "sha256": "0"}}}',
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused(checkpoint, manifest):
    (checkpoint / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointError, match="manifest"):
        storage.verify_manifest(checkpoint)


@pytest.fixture
def stage(tmp_path):
    """A finished stage whose marker has the checksums of a folder and of a file."""
    folder = tmp_path / "sft"
    for name, content in (
        ("final/model.safetensors", b"w" * 1000),
        ("final/a/b.json", b"{}"),
        ("kept", b"k"),
    ):
        storage.atomic_write(folder / name, content)
    storage.mark_done(folder, reads=["final", "kept"], seconds=1.5)
    return folder


@pytest.mark.fault(
    "storage", "a file of a finished stage damaged, cut or deleted", "a sentence with the file"
)
@pytest.mark.parametrize("name", ["final/model.safetensors", "final/a/b.json", "kept"])
@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "longer", "deleted"])
def test_a_finished_stage_s_files_are_as_it_wrote_them(stage, name, damage):
    seen = {}
    storage.verify_done(stage, seen)
    assert storage.read_json(stage / "done.json")["seconds"] == 1.5
    path = stage / name
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    damaged = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "flipped": flipped,
        "longer": content + b"x",
    }
    path.unlink() if damage == "deleted" else path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=rf"{path}: the .*\n.*remove {stage} and what was made from it"):
        storage.verify_done(stage, seen)
    path.write_bytes(content)
    storage.verify_done(stage, seen)


def test_a_marker_without_checksums_is_one_of_an_earlier_version(stage):
    (stage / "done.json").write_text('{"seconds": 1}')
    storage.verify_done(stage, {})
    (stage / "done.json").write_text('{"files": {"kept": 1}}')
    with pytest.raises(DataError, match="not a marker"):
        storage.verify_done(stage, {})


def test_what_was_seen_whole_is_not_read_again(stage, monkeypatch):
    seen = {}
    storage.verify_done(stage, seen)
    monkeypatch.setattr(storage, "file_sum", None)
    storage.verify_done(stage, seen)


@pytest.mark.fault("storage", "the disk is full while a log is closed", "a sentence")
def test_a_full_disk_when_a_log_is_closed_is_a_sentence(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    log = storage.JsonlAppender(tmp_path / "log.jsonl", sync_s=60)
    log.append([{"a": 1}])
    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(RunFolderError, match="No space left"), log:
        pass
    assert storage.read_jsonl(tmp_path / "log.jsonl") == [{"a": 1}]


def test_a_folder_without_manifest_is_incomplete(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        storage.verify_manifest(checkpoint)


# ------------------------------------------------------------------------------ paths


def test_paths_inside_the_root_are_fine_however_they_are_written(tmp_path):
    root = tmp_path / "with space ü"
    (root / "a").mkdir(parents=True)
    (root / "real.png").write_bytes(b"")
    (root / "a" / "link.png").symlink_to("../real.png")
    for path in ("real.png", "a/../real.png", "./real.png", "a/link.png", str(root / "real.png")):
        assert storage.confined(root, path) == root / "real.png"
