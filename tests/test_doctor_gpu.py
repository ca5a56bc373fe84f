"""`rlcs doctor --gpu` on a CPU: every check passes on a healthy machine, and fails with a fault in it."""

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import warm
from rlcs import storage
from rlcs.cli.main import app
from rlcs.doctor.gpu import (
    Check,
    Setting,
    attention,
    checkpoint,
    devices,
    memory,
    models,
    runner,
    sharding,
    speed,
    start,
    step,
    table,
    trees,
    versions,
    vllm,
)
from rlcs.doctor.gpu.ranks import OwnMachine, environment, free_port
from rlcs.doctor.gpu.runner import SPECS, Spec, run
from rlcs.engines.local import LocalEngine
from rlcs.errors import UserError
from rlcs.model import layout, loading, packing, tree_attention
from rlcs.plan.measured import Rates, read_rates
from rlcs.train import state as training

TESTS = Path(__file__).parent


@pytest.fixture
def setting(tmp_path):
    return Setting(folder=str(tmp_path), cpu=True)


@pytest.fixture
def group(monkeypatch):
    """The environment of a process group of one rank."""
    for name, value in environment(0, OwnMachine(size=1), port=free_port()).items():
        monkeypatch.setenv(name, value)


# --- the runner -----------------------------------------------------------------------------------

FAKES = {
    "good": 'return Check(ok=True, message="fine", values={"a": 1}, rates={"start_s": 2.0})',
    "hanging": "print('at work', flush=True)\n    time.sleep(60)",
    "crashing": "os.kill(os.getpid(), 9)",
    "exhausted": "raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')",
    "native": "print('CUDA out of memory. Tried to allocate 3.00 GiB', flush=True)\n    os._exit(3)",
    "refusing": "raise UserError('it is wrong', fix='mend it')",
    "gpu": "return Check(ok=True, message=os.environ['CUDA_VISIBLE_DEVICES'], "
    "values={'gpu': os.environ['CUDA_VISIBLE_DEVICES']})",
    "slower": "rank = int(os.environ['RANK'])\n"
    "    return Check(ok=True, message='both', rates={'collective': 3.0 - rank})",
    "half": "if os.environ['RANK'] == '1':\n        raise UserError('rank 1 is ill', fix='mend')\n"
    "    time.sleep(60)",
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Specs of checks that behave in one way each."""
    folder = tmp_path / "modules"
    folder.mkdir()
    head = "import os, time\nfrom rlcs.doctor.gpu import Check\nfrom rlcs.errors import UserError\n"
    for name, body in FAKES.items():
        (folder / f"fake_{name}.py").write_text(f"{head}def check(setting):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")

    def specs(*names, runs="once", seconds=0.5):
        return [Spec(name=name, module=f"fake_{name}", runs=runs, seconds=seconds) for name in names]

    return specs


def results(specs, tmp_path, *, minutes=1.0, size=1):
    shown = []
    setting = Setting(folder=str(tmp_path), cpu=True)
    found = run(specs, setting, OwnMachine(size=size), minutes=minutes, say=shown.append)
    assert [check.name for check in found] == [spec.name for spec in specs]
    return found, shown


def test_a_failing_check_costs_no_other_one(fakes, tmp_path):
    specs = fakes("crashing", "exhausted", "native", "refusing", "good")
    found, shown = results(specs, tmp_path)
    assert [check.ok for check in found] == [False, False, False, False, True]
    assert "was killed by SIGKILL" in found[0].message
    assert found[1].message.startswith("GPU memory ran out: 2.00 GB") and "smaller" in found[1].fix
    assert found[2].message.startswith("GPU memory ran out: 3.00 GB") and "smaller" in found[2].fix
    assert (found[3].message, found[3].fix) == ("it is wrong", "mend it")
    assert found[4].values == {"a": 1} and found[4].rates == {"start_s": 2.0}
    assert all(check.fix for check in found[:4]) and len(shown) == 5


def test_a_check_that_hangs_is_ended_and_what_no_longer_fits_is_skipped(fakes, tmp_path):
    found, _ = results(fakes("hanging", "good", seconds=2.0), tmp_path, minutes=0.05)
    assert [check.ok for check in found] == [False, None]
    assert "did not end in 3 s" in found[0].message and "at work" in found[0].message
    assert found[0].seconds < 10
    assert "about 2 s, and 0 s were left" in found[1].message and "--minutes" in found[1].fix


def test_each_gpu_has_a_process_that_sees_it_alone(fakes, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found, _ = results(fakes("gpu", runs="each"), tmp_path, size=2)
    assert found[0].values == {"gpu": "0", "by_rank": [{"gpu": "1"}]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    found, _ = results([*fakes("gpu", runs="each"), *fakes("gpu", runs="once")], tmp_path, size=2)
    assert found[0].values == {"gpu": "3", "by_rank": [{"gpu": "GPU-5"}]}
    assert found[1].values == {"gpu": "3,GPU-5"}


def test_the_slowest_rank_counts_and_an_ill_one_is_named(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE_S", 0.5)
    found, _ = results(fakes("slower", "half", runs="together"), tmp_path, size=2)
    assert found[0].rates == {"collective": 2.0} and "slowest of 2" in found[0].message
    assert (found[1].ok, found[1].message, found[1].fix) == (False, "rank 1: rank 1 is ill", "mend")
    assert found[1].seconds < 20


def test_the_ranks_of_torchrun_check_together(fakes, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from rlcs.doctor.gpu.runner import SPECS, Spec\n"
        "from rlcs.doctor.gpu.start import examine_gpus\n"
        "specs = [spec for spec in SPECS if spec.name == 'sharding']\n"
        "specs += [Spec(name='slower', module='fake_slower', runs='together', seconds=1)]\n"
        "specs += [Spec(name='refusing', module='fake_refusing', runs='once', seconds=1)]\n"
        "found = examine_gpus(minutes=4, executable='', cpu=True, say=print, specs=specs)\n"
        "open(sys.argv[1] + __import__('os').environ['RANK'], 'w').write(json.dumps(found.content))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [free_port(), str(script), str(tmp_path / "result")]
    done = warm.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "result0").read_text())
    assert content["ranks"] == 2 and [check["ok"] for check in content["checks"]] == [True, True, False]
    assert content["checks"][0]["values"]["ranks"] == 2 and content["rates"]["collective"] == 2.0
    assert content["checks"][2]["message"] == "it is wrong", "rank 0 alone"
    assert not list(tmp_path.glob(".rlcs-doctor-*")), "nothing is left"


def test_the_estimates_fit_into_the_default_minutes():
    assert 400 < sum(spec.seconds for spec in SPECS) <= 480
    assert [spec.name for spec in SPECS][:3] == ["versions", "attention", "trees"]


# --- each check, healthy and with a fault ---------------------------------------------------------


def test_attention(setting, monkeypatch):
    assert attention.check(setting).ok
    with monkeypatch.context() as patch:
        patch.setattr(attention, "MOST_GRAPHS", -1)
        patch.setattr(attention, "_worst", lambda *arguments: (0.0, 1.0))
        assert "kernels were compiled" in attention.check(setting).message
    monkeypatch.setattr(tree_attention, "over_what_they_follow", lambda *_: [])
    found = attention.check(setting)
    assert not found.ok and found.fix == "set model.attention=dense" and "float32: off by" in found.message


def shifted(tree, shape):
    positions = packing.trunk_positions(tree.prompt)
    restart = int(positions.max()) + 2
    texts = [torch.arange(restart, restart + len(b.ids)).expand(3, -1) for b in tree.branches]
    return torch.cat([positions, *texts], dim=1)


def without_rows_and_columns(tree, shape):
    count = len(tree.prompt.ids)
    texts = [torch.arange(count, count + len(b.ids)) for b in tree.branches]
    return torch.cat([torch.arange(count), *texts]).expand(3, -1)


def test_trees(setting):
    assert trees.check(setting).ok


@pytest.mark.parametrize("positions", [shifted, without_rows_and_columns])
def test_trees_with_wrong_positions(setting, monkeypatch, positions):
    monkeypatch.setattr(packing, "_positions", positions)
    found = trees.check(setting)
    assert not found.ok and "nats" in found.message and found.fix


def test_trees_whose_branches_see_each_other(setting, monkeypatch):
    monkeypatch.setattr(layout.Layout, "ends", lambda layout: [layout.length] * len(layout.segments))
    real_load = loading.load
    monkeypatch.setattr(loading, "load", lambda *a, **k: replace(real_load(*a, **k), attention="dense"))
    assert not trees.check(setting).ok


def test_gradients_of_trees_count_too(setting, monkeypatch):
    real = trees.score

    def half(vlm, packed):
        scores = real(vlm, packed)
        return replace(scores, logprobs=(scores.logprobs + scores.logprobs.detach()) / 2)

    monkeypatch.setattr(trees, "score", half)
    found = trees.check(setting)
    assert not found.ok and "gradient 50.00%" in found.message


def test_sharding(setting, group, monkeypatch):
    found = sharding.check(setting)
    assert found.ok and found.values["ranks"] == 1, found
    real = loading.spread

    def wrong(vlm, parallel):
        sharded = real(vlm, parallel)
        with torch.no_grad():
            next(iter(sharded.model.parameters())).mul_(1.1)
        return sharded

    monkeypatch.setattr(loading, "spread", wrong)
    found = sharding.check(setting)
    assert not found.ok and "in float32 off by" in found.message


def test_checkpoint(setting, group):
    found = checkpoint.check(setting)
    assert found.ok and found.rates["disk_write"] > 0 and found.rates["disk_read"] > 0, found


def test_checkpoint_with_a_damaged_byte(setting, group, monkeypatch):
    real = checkpoint.Checkpoints.wait

    def damaging(checkpoints):
        real(checkpoints)
        if not (file := checkpoints.folder / "step-000001" / "model.safetensors").exists():
            return  # `start` waits too
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", damaging)
    with pytest.warns(RuntimeWarning):
        found = checkpoint.check(setting)
    assert not found.ok and "not found again" in found.message


def test_checkpoint_that_comes_back_changed(setting, group, monkeypatch):
    real = training.restore

    def changing(state, model, optimizer):
        real(state, model, optimizer)
        with torch.no_grad():
            next(iter(model.parameters())).add_(1e-6)

    monkeypatch.setattr(training, "restore", changing)
    found = checkpoint.check(setting)
    assert not found.ok and "came back changed" in found.message


def test_checkpoint_whose_damage_nobody_notices(setting, group, monkeypatch):
    def credulous(folder, **options):
        return storage.read_json(folder / storage.MANIFEST)["files"]

    monkeypatch.setattr(storage, "verify_manifest", credulous)
    found = checkpoint.check(setting)
    assert not found.ok and "a damaged byte is not noticed" in found.message


def test_memory(setting, monkeypatch):
    found = memory.check(setting)
    assert found.ok and 0.85 < found.values["kept measured"] / found.values["kept planned"] < 1.15, found
    real = memory.update_peak
    monkeypatch.setattr(memory, "update_peak", lambda *args, **options: real(*args, **options) / 1.4)
    found = memory.check(setting)
    assert not found.ok and "planned" in found.message and "pack_tokens" in found.fix


def test_speed(setting):
    found = speed.check(setting)
    names = ("images", "forward_share", "update_share", "vision_share")
    assert found.ok and all(found.rates[name] > 0 for name in names)


@pytest.mark.parametrize(
    ("free", "label", "layers"), [(79, "7B", 28), (46, "7B", 24), (23, "7B", 8), (15, "3B", 18), (6, "3B", 2)]
)
def test_the_model_for_speed_is_as_deep_as_memory_allows(setting, free, label, layers):
    shape, sizes = speed.deepest(replace(setting, cpu=False), free << 30)
    assert (shape.label, shape.layers) == (label, layers)
    assert layers == 2 or 4 * sizes.total <= 0.6 * (free << 30)


def test_a_data_sheet_s_peak_is_that_of_bfloat16(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert devices.peak_speed(device) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert devices.peak_speed(device) is None


def test_step(setting):
    found = step.check(setting)
    assert found.ok, found
    assert {"rollout", "grade", "reference", "update"} <= found.values["seconds"].keys()
    assert found.values["tokens_per_s_per_gpu"] > 0 and found.values["model_flops_share"] > 0


def test_step_with_a_sampler_that_gives_other_logprobs(setting, monkeypatch):
    real = LocalEngine.sample

    def off(*args, **options):
        groups = real(*args, **options)
        return [
            tuple(replace(r, logprobs=tuple(x - 1.0 for x in r.logprobs)) for r in group) for group in groups
        ]

    monkeypatch.setattr(LocalEngine, "sample", off)
    found = step.check(setting)
    assert not found.ok and "1 nats from the policy's" in found.message


def test_step_without_a_gradient(setting, monkeypatch):
    monkeypatch.setattr(step, "_ODD", "def odd(problem, response):\n    return 1.0\n")
    found = step.check(setting)
    assert not found.ok and found.message == "the gradient is zero"


def test_vllm_that_answers_with_other_logprobs(tmp_path):
    (tmp_path / "vllm").mkdir()
    behaviour = {"placeholder": 518, "expand": (336 // 28) ** 2}
    (tmp_path / "vllm" / "behaviour.json").write_text(json.dumps(behaviour))
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {TESTS / "fake_vllm.py"} "$@"\n')
    program.chmod(0o755)
    found = vllm.check(Setting(folder=str(tmp_path), executable=str(program), cpu=True))
    assert not found.ok and "nats from ours" in found.message, found
    assert "vLLM 0.32 or newer" in found.fix and found.values["start_s"] > 0


def test_without_vllm_its_check_is_skipped(setting):
    found = vllm.check(setting)
    assert found.ok is None and "--executable" in found.fix


# --- versions -------------------------------------------------------------------------------------


def test_versions(setting):
    found = versions.check(setting)
    assert found.ok and found.values["packages"]["torch"] == torch.__version__.partition("+")[0], found


def test_an_old_vllm_fails(setting, tmp_path):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho 0.31.9\n")
    program.chmod(0o755)
    found = versions.check(replace(setting, executable=str(program)))
    assert not found.ok and "vLLM 0.31.9 is too old" in found.message and "0.32" in found.fix


def test_requirements_that_are_not_met():
    needs = ["torch==2.13.0", "Transformers>=5", "odd_name<2; extra == 'x'", "ruamel-yaml<1", "triton"]
    have = {"torch": "2.14.1+cu130", "transformers": "5.24.0", "ruamel.yaml": "0.18"}
    assert list(versions.unmet(needs, have)) == ["torch==2.13.0 (2.14.1+cu130)", "triton (not installed)"]


# --- table, JSON, command -------------------------------------------------------------------------


def test_the_json_has_no_names_and_a_plan_reads_its_rates(tmp_path):
    host, home = socket.gethostname(), Path.home()
    message = f"cannot write {home}/runs/secret/x.bin on {host}: see {tmp_path}/vllm.log at http://127.0.0.1:80/v1/x"
    checks = [
        Check(name="vllm", ok=False, message=message, fix="~/bin/vllm", values={"gap": float("nan")}),
        Check(name="speed", ok=True, message="", rates={"forward_share": 0.41, "images": 0.0}),
        Check(name="sharding", ok=None, message="", rates={"collective": 1e11}),
    ]
    content = table.to_json(checks, device="NVIDIA H100 80GB HBM3", ranks=8)
    text = json.dumps(content, allow_nan=False)
    assert (
        str(tmp_path) not in text and "secret" not in text and "x.bin" in text and "127.0.0.1:80/v1/x" in text
    )
    assert len(host) <= 3 or host not in text
    assert content["checks"][0]["values"] == {"gap": "nan"} and content["ok"] is False
    (tmp_path / "gpu.json").write_text(text)
    expected = Rates(device="NVIDIA H100 80GB HBM3", forward_share=0.41, collective=1e11)
    assert read_rates(tmp_path / "gpu.json") == expected


def test_every_rate_of_a_check_is_one_of_a_plan():
    with pytest.raises(TypeError):
        table.to_json([Check(ok=True, message="", rates={"unknown": 1.0})], device="CPU", ranks=1)


def test_the_table(tmp_path):
    lines = table.table(
        [
            Check(name="versions", ok=True, message="torch 2", seconds=3.0),
            Check(name="trees", ok=False, message="off", fix="set it", seconds=61.5),
            Check(name="speed", ok=None, message="no time", fix="--minutes 12"),
        ]
    )
    assert lines == [
        "ok versions       3.0 s  torch 2",
        "!! trees         61.5 s  off",
        "   -> set it",
        "-- speed          0.0 s  skipped: no time",
        "   -> --minutes 12",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_long_lines_of_the_table_are_wrapped_and_fixes_are_not(width):
    message, fix = "float32 0.0e+00 (1.0e-04), " * 9, "python3 -m venv vllm-env && " * 9
    lines = table.table([Check(name="trees", ok=False, message=message, fix=fix)], width)
    assert len(lines) > 3 and all(len(line) <= width for line in lines[:-1])
    assert all(line.startswith(" " * 25) for line in lines[1:-1]) and lines[-1] == f"   -> {fix}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "--cpu", "--out", "FOLDER"], "it is a folder"),
        (["--gpu", "--cpu", "--out", "FOLDER/file/gpu.json"], "cannot write"),
        (["--gpu", "--cpu", "--executable", "vlm"], "there is no program vlm"),
        (["--out", "gpu.json"], "belongs to the checks of GPUs"),
        (["--executable", "vllm-env/bin/vllm"], "belongs to the checks of GPUs"),
    ],
)
def test_a_mistake_is_found_before_any_check(words, said, fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(start.examine_gpus, "__kwdefaults__", {"specs": fakes("good")})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    done = CliRunner().invoke(app, ["doctor", *words])
    assert isinstance(done.exception, UserError) and said in str(done.exception)
    assert "runs" not in done.output and done.exception.fix


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU"):
        CliRunner().invoke(app, ["doctor", "--gpu"], catch_exceptions=False, standalone_mode=False)
    with pytest.raises(UserError, match="without GPUs"):
        CliRunner().invoke(app, ["doctor", "x", "--gpu"], catch_exceptions=False, standalone_mode=False)


def test_the_command_writes_json_and_ends_with_one_where_a_check_fails(fakes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start.examine_gpus, "__kwdefaults__", {"specs": fakes("good", "refusing")})
    done = CliRunner().invoke(app, ["doctor", "--gpu", "--cpu", "--json", "--out", "gpu.json"])
    content = json.loads(done.stdout)
    assert done.exit_code == 1 and content == storage.read_json(Path("gpu.json"))
    assert content["rates"] == {"device": "CPU", "start_s": 2.0}
    assert [check["ok"] for check in content["checks"]] == [True, False]
    monkeypatch.setattr(start.examine_gpus, "__kwdefaults__", {"specs": fakes("good")})
    done = CliRunner().invoke(app, ["doctor", "--gpu", "--cpu", "--minutes", "0.2"])
    assert done.exit_code == 0 and done.stdout.startswith("ok good ")
    assert not list(tmp_path.glob(".rlcs-doctor-*"))


def test_real_shapes_are_those_of_published_models():
    for shape in models.shapes(Setting(folder="")):
        config = models.configuration(shape)
        assert config.text_config.hidden_size == {"3B": 2048, "7B": 3584}[shape.label]
        assert config.text_config.num_attention_heads == {"3B": 16, "7B": 28}[shape.label]
        assert config.vision_config.fullatt_block_indexes == [1, 3] and config.vision_config.depth == 4
