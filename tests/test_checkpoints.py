"""Checkpoints of several ranks: each writes, verifies and reads its own rows; other numbers read them too."""

import json
from pathlib import Path

import pytest

from test_distributed import launch

WORKER = Path(__file__).with_name("checkpoint_worker.py")
TIED = 4 * 8 * 1000
"""Bytes of the weight that is read under each of its two names."""
UNSHARDED = 4 * (5 + 4)
"""Bytes of a buffer of five numbers, and of the step of each of four weights."""
Read = dict[str, list[dict]]


def run(size: int, jobs: dict[str, dict], root: Path) -> Read:
    """What each rank reported of each job."""
    path = root / f"jobs-{size}.json"
    path.write_text(json.dumps([job | {"folder": str(root / job["folder"])} for job in jobs.values()]))
    ranks = launch(size, path, WORKER)
    errors = [rank.communicate(timeout=400)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(errors)
    found = [json.loads(path.with_name(f"{path.stem}-{rank}.json").read_text()) for rank in range(size)]
    return {name: [of_rank[number] for of_rank in found] for number, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def of_four(root: Path) -> Read:
    """By four ranks: four files, and two files of two copies of the model."""
    jobs = {
        "save": {"mesh": [4], "work": "save", "folder": "four"},
        "save copies": {"mesh": [2, 2], "work": "save", "folder": "two"},
        "own": {"mesh": [4], "work": "load", "folder": "four"},
        "fewer files": {"mesh": [4], "work": "load", "folder": "two"},
        "copies": {"mesh": [2, 2], "work": "load", "folder": "two"},
    }
    return run(4, jobs, root)


@pytest.fixture(scope="module")
def of_two(root: Path, of_four: Read) -> Read:
    jobs = {
        "own": {"mesh": [2], "work": "load", "folder": "two"},
        "more files": {"mesh": [2], "work": "load", "folder": "four"},
        "fail": {"mesh": [2], "work": "fail", "folder": "two"},
    }
    return run(2, jobs, root)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")


def test_each_rank_writes_its_rows_and_copies_of_them_are_written_once(root, of_four):
    pair = ["model-1.safetensors", "model.safetensors", "optimizer-1.safetensors", "optimizer.safetensors"]
    assert files(root / "two" / "step-000001") == [*pair, "state.json"]
    assert len(files(root / "four" / "step-000001")) == 9
    for read in (*of_four["save"], *of_four["save copies"]):
        assert read["hashed"] == {} and read["opened"] == [], "checksums are taken while it is written"


@pytest.mark.parametrize("size", [2, 4])
def test_as_many_ranks_verify_and_read_their_own_files_alone(size, request):
    ranks = request.getfixturevalue("of_two" if size == 2 else "of_four")["own"]
    for rank, read in enumerate(ranks):
        end = f"-{rank}.safetensors" if rank else ".safetensors"
        own = {f"model{end}", f"optimizer{end}"}
        assert read["hashed"].keys() == (own if rank else own | {"state.json"})
        first = {"model.safetensors", "optimizer.safetensors"}
        assert set(read["opened"]) == own | first, "rank 0's hold what is not sharded"
        assert read["bytes"] == read["own"] + TIED // size + UNSHARDED


def test_other_ranks_read_the_rows_that_they_need_and_verify_every_byte_once(root, of_two, of_four):
    cases = {"two": (of_four["fewer files"], of_four["copies"]), "four": (of_two["more files"],)}
    for folder, loads in cases.items():
        for ranks in loads:
            hashed = [name for read in ranks for name in read["hashed"]]
            assert sorted(hashed) == files(root / folder / "step-000001")
            parts = 2 if ranks is not of_four["fewer files"] else 4
            for read in ranks:
                assert read["bytes"] == read["own"] + TIED // parts + UNSHARDED


def test_when_one_rank_cannot_write_all_say_so_and_nothing_is_left(root, of_two):
    first, second = (rank["error"] for rank in of_two["fail"])
    assert first == second and "No space left on device" in first
    assert "step-000002.tmp-" in first and "model-1.safetensors: cannot write" in first
    assert files(root / "two") == ["step-000001"]
