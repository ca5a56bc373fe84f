"""Rates measured on a machine: what is read back, what is said of files that are none, and their use."""

import json

import pytest
from typer.testing import CliRunner

from rlcs.cli.main import app
from rlcs.errors import UserError
from rlcs.plan.machine import GPUS, device_named
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
    ],
)
def test_a_file_without_rates_is_named_with_what_is_wrong(tmp_path, content, said):
    path = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_rates(path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert "rlcs doctor --gpu --out" in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_rates(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GH200 480GB", ""),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", ""),
        ("cpu", ""),
    ],
)
def test_devices_are_known_by_the_names_that_drivers_give(name, key):
    assert device_named(name) == key and (not key or key in GPUS)


def planned(tmp_path, device, *words):
    path = written(tmp_path, {"rates": Rates(device=device, update_share=0.5).to_json()})
    return CliRunner().invoke(app, ["plan", "recommended-3b", "--measured", str(path), *words])


def test_a_plan_takes_the_rates_of_a_file(tmp_path):
    done = planned(tmp_path, "NVIDIA H100 80GB HBM3", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["rates"]["update_share"] == {"value": 0.5, "basis": "measured"}
    done = planned(tmp_path, "NVIDIA H100 80GB HBM3", "--explain")
    assert "rates, measured: update_share=0.5" in done.output and "warning" not in done.output


def test_rates_of_another_device_are_refused_and_of_an_unknown_one_warned_of(tmp_path):
    done = planned(tmp_path, "NVIDIA A100-SXM4-80GB")
    assert isinstance(done.exception, UserError) and "--gpu A100-80" in str(done.exception)
    done = planned(tmp_path, "NVIDIA H100 80GB HBM3", "--gpus", "0")
    assert isinstance(done.exception, UserError) and "the plan is for CPU" in str(done.exception)
    done = planned(tmp_path, "cpu")
    assert isinstance(done.exception, UserError) and "--gpus 0" in str(done.exception)
    done = planned(tmp_path, "NVIDIA GH200 480GB")
    assert "warning: measured on NVIDIA GH200 480GB, which no table has: it is taken for H100" in done.output
    assert planned(tmp_path, "cpu", "--gpus", "0").exit_code == 0
