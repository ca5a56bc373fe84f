"""Rates measured on a machine: what is read back, and what is said of files that are none."""

import json

import pytest

from rlcs.errors import UserError
from rlcs.plan.measured import Rates, read_rates


def written(tmp_path, content):
    path = tmp_path / "measured.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_rates_come_back_as_they_were_written(tmp_path):
    rates = Rates(device="NVIDIA H100 80GB HBM3", update_share=0.41, wake_s=0.7)
    assert rates.to_json() == {"device": "NVIDIA H100 80GB HBM3", "update_share": 0.41, "wake_s": 0.7}
    more = {"rates": rates.to_json() | {"of a later version": 3}, "checks": []}
    assert read_rates(written(tmp_path, more)) == rates


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is no JSON"),
        ("[1]", "it holds no measured rates of a device"),
        ({"rates": None}, "it holds no measured rates of a device"),
        ({"rates": {"update_share": 0.4}}, "it holds no measured rates of a device"),
        ({"rates": {"device": "x", "wake_s": -1}}, "rates.wake_s is -1, and should be a number above 0"),
        ({"rates": {"device": "x", "wake_s": True}}, "rates.wake_s is True, and should be a number above 0"),
        ({"rates": {"device": "x", "wake_s": "1"}}, "rates.wake_s is '1', and should be a number above 0"),
        ({"rates": {"device": "x", "to_host": float("inf")}}, "rates.to_host is inf"),
        ({"rates": {"device": "x", "wake_s": float("nan")}}, "rates.wake_s is nan"),
        ({"rates": {"device": "x", "update_share": 1.2}}, "should be a share of at most 1 above 0"),
    ],
)
def test_a_file_without_rates_is_named_with_what_is_wrong(tmp_path, content, said):
    path = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_rates(path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert "rlcs doctor --gpu --json" in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_rates(tmp_path / "nothing.json")
