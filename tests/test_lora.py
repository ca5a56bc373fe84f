"""LoRA: adapters start at zero, learn alone, resume and merge exactly, and step aside as the reference."""

import json
import resource
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from conftest import LengthGrader, Stopper, make_problem, tree_of
from rlcs.data import puzzles
from rlcs.data.run_data import load_run_data
from rlcs.engines.local import LocalEngine
from rlcs.errors import CheckpointError, RecipeError, RunFolderError
from rlcs.grading.reward import WeightedSum
from rlcs.model import loading
from rlcs.model import lora as adapters
from rlcs.model.packing import pack
from rlcs.model.parity_check import require_agreement
from rlcs.model.policy import score
from rlcs.pipeline.study import Study
from rlcs.progress import Output, screen
from rlcs.recipe.execution import Lora
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Model, Recipe
from rlcs.recipe.stages import Grpo, Optimizer, Sft
from rlcs.recipe.table import summary_rows
from rlcs.records import Demonstration, Grade
from rlcs.records.trees import Branch, Tree
from rlcs.signals import StopFlag, Stopped
from rlcs.train import grpo, sft
from rlcs.train import state as state_of
from rlcs.train.checkpoint import Checkpoints
from rlcs.train.context import GrpoContext
from rlcs.train.run_dir import RunDir
from rlcs.train.trainer import Batch, Trainer, logprobs_of

LORA = Lora(rank=4, alpha=16)
EVERYWHERE = Lora(rank=4, alpha=16, parts=("vision_tower", "merger", "language_model"))


def adapted(folder, lora=LORA, frozen=(), **model):
    plain = loading.load(Model(name=str(folder), **model), device=torch.device("cpu"))
    vlm = loading.prepare(plain, lora, frozen, seed=0)
    return vlm, loading.make_chat(vlm)


def one_pack(chat):
    trees = []
    for name, shapes in (("a", ((56, 84),)), ("b", ()), ("c", ((84, 84), (56, 56)))):
        branches = tuple(Branch(ids=tuple(range(30 + i, 40 + i)), weights=(1.0,) * 10) for i in range(3))
        trees.append(Tree(prompt=chat.prompt(make_problem(name, f"q {name}", shapes)), branches=branches))
    return pack(trees, chat.patches)


def learn(vlm, packed, steps=3, lr=3e-3):
    """A few steps on what the pack holds; the trainer, for a look at its optimiser."""
    trainer = Trainer(vlm, Optimizer(lr=lr), steps=steps, max_bad_steps=1)
    objective = sft.make_objective("token")
    for _ in range(steps):
        trainer.step([Batch(pack=packed)], objective, average="token")
    return trainer


def logprobs(vlm, packed):
    return logprobs_of(vlm, [packed], temperature=1.0)[0]


def trained(vlm):
    return {name: p.detach().clone() for name, p in vlm.parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LORA, EVERYWHERE], ids=["language model", "everywhere"])
def test_a_new_adapter_changes_no_logprob_at_all(random_model_folder, vlm, chat, lora):
    packed = one_pack(chat)
    before = logprobs(vlm, packed)
    assert torch.equal(logprobs(adapted(random_model_folder, lora)[0], packed), before)


@pytest.mark.parametrize("lora", [LORA, EVERYWHERE], ids=["language model", "everywhere"])
def test_only_adapters_learn_and_the_reference_does_not_move(random_model_folder, lora):
    vlm, chat = adapted(random_model_folder, lora)
    packed = one_pack(chat)
    vlm, reference = grpo.with_reference(vlm, lambda whole: whole)
    assert reference.model is vlm.model, "the reference costs no copy"
    start = logprobs(vlm, packed)
    frozen = {n: p.detach().clone() for n, p in vlm.model.named_parameters() if not p.requires_grad}
    trainer = learn(vlm, packed)
    assert (logprobs(vlm, packed) - start).abs().max() > 0.1
    assert torch.equal(logprobs(reference, packed), start)
    assert (logprobs(vlm, packed) - start).abs().max() > 0.1, "the adapter is on again"
    assert_same(frozen, {n: p for n, p in vlm.model.named_parameters() if n in frozen})
    names = {p: n for n, p in vlm.model.named_parameters()}
    assert all(".lora_" in names[p] for p in trainer.optimizer.state)
    assert all((p.grad is None) == (".lora_" not in n) for n, p in vlm.model.named_parameters())
    learn(vlm, packed, steps=1)  # training goes on after the reference's turn
    assert all(p.requires_grad for n, p in vlm.model.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize("lora", [LORA, EVERYWHERE], ids=["language model", "everywhere"])
def test_merged_says_what_the_adapter_says_and_plain_transformers_loads_it(
    random_model_folder, tmp_path, lora
):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    vlm, chat = adapted(random_model_folder, lora)
    packed = one_pack(chat)
    learn(vlm, packed)
    ours, kept = logprobs(vlm, packed), trained(vlm)
    loading.save(vlm, tmp_path)
    assert_same(kept, trained(vlm))
    assert torch.equal(logprobs(vlm, packed), ours), "saving changes nothing"
    shown = (tmp_path / "config.json").stat().st_mode
    tmp_path.chmod(0o755)
    loading.save(vlm, tmp_path)
    assert {path.stat().st_mode for path in tmp_path.rglob("*.safetensors")} == {shown}, "others may read it"
    merged = loading.load(Model(name=str(tmp_path)), device=torch.device("cpu"))
    torch.testing.assert_close(logprobs(merged, packed), ours, rtol=1e-5, atol=1e-5)
    tied = merged.model.lm_head.weight is merged.model.get_input_embeddings().weight
    assert tied == vlm.model.config.tie_word_embeddings
    stock, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    plain = loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"))
    assert stock.state_dict().keys() == plain.model.state_dict().keys()
    PeftModel.from_pretrained(plain.model, tmp_path / "adapter")
    torch.testing.assert_close(logprobs(plain, packed), ours, rtol=1e-6, atol=1e-6)


def as_peft_does(vlm):
    """The same model with peft's own matrices, which compute in fp32."""
    from peft.tuners.lora import LoraLayer

    for module in list(vlm.model.modules()):
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = True
            for matrices in (module.lora_A, module.lora_B):
                for name, matrix in matrices.items():
                    linear = torch.nn.Linear(1, 1, bias=False)
                    linear.weight = matrix.weight
                    matrices[name] = linear


def with_random_adapters(folder, dtype):
    vlm, chat = adapted(folder, EVERYWHERE, dtype=dtype)
    torch.manual_seed(5)
    for name, parameter in vlm.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if "lora_B" in name else 0.1)
    return vlm, one_pack(chat)


def gradients_and_kept(vlm, packed):
    """Logprobs, the adapters' gradients, and the bytes of distinct tensors kept for the backward pass."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    vlm.model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = score(vlm, packed).logprobs
    size = sum(size for _, size in kept.values())
    scores.sum().backward()
    return scores.detach(), {name: p.grad.clone() for name, p in vlm.parameters()}, size


def test_adapters_of_a_float32_model_compute_as_peft_does_to_the_bit(random_model_folder):
    vlm, packed = with_random_adapters(random_model_folder, "float32")
    ours, own, _ = gradients_and_kept(vlm, packed)
    as_peft_does(vlm)
    theirs, their, _ = gradients_and_kept(vlm, packed)
    assert torch.equal(ours, theirs)
    assert_same(own, their)


def test_adapters_compute_in_bfloat16_and_learn_in_float32(random_model_folder):
    """Their gradients are as near to an exact model's as with peft's matrices in fp32, and less is kept."""
    exact, packed = with_random_adapters(random_model_folder, "float32")
    logprobs, gradients, _ = gradients_and_kept(exact, packed)
    vlm, packed = with_random_adapters(random_model_folder, "bfloat16")
    ours, own, kept = gradients_and_kept(vlm, packed)
    as_peft_does(vlm)
    theirs, their, kept_by_peft = gradients_and_kept(vlm, packed)
    assert {p.dtype for _, p in vlm.parameters()} == {torch.float32} == {g.dtype for g in own.values()}
    assert (ours - logprobs).abs().mean() < 1.5 * (theirs - logprobs).abs().mean() < 0.05

    def error(found):
        off = sum((found[n] - g).square().sum() for n, g in gradients.items())
        return (off / sum(g.square().sum() for g in gradients.values())).sqrt().item()

    print(error(own), error(their), kept, kept_by_peft)  # noqa: T201
    assert error(own) < 1.5 * error(their) < 0.1
    assert kept < 0.8 * kept_by_peft


def test_packed_logprobs_and_rollouts_agree_with_the_adapted_model(random_model_folder):
    vlm, chat = adapted(random_model_folder, EVERYWHERE)
    packed = one_pack(chat)
    learn(vlm, packed)
    prompts = [chat.prompt(make_problem("r", "how?", ((56, 84),))), chat.prompt(make_problem("s", "so", ()))]
    groups = LocalEngine(vlm, chat, max_rows=6).sample(prompts, chat.sampling(max_new_tokens=8, n=3, seed=1))
    trees = list(map(tree_of, prompts, groups))
    again = pack(trees, chat.patches)
    torch.testing.assert_close(logprobs(vlm, again), again.sampler_logprobs, rtol=1e-4, atol=1e-4)
    assert require_agreement(vlm, chat, trees).gap < 1e-4


def test_gradient_checkpointing_gives_the_same_gradients(random_model_folder):
    gradients = []
    for checkpointing in (False, True):
        vlm, chat = adapted(random_model_folder, EVERYWHERE, gradient_checkpointing=checkpointing)
        packed = one_pack(chat)
        learn(vlm, packed, steps=1)
        vlm.model.train()
        vlm.model.zero_grad()
        score(vlm, packed).logprobs.sum().backward()
        gradients.append({n: p.grad for n, p in vlm.parameters()})
    assert all(grad.abs().max() > 0 for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


# --- what each choice does -----------------------------------------------------------------------


def places(vlm):
    return {name.split(".lora_")[0] for name, _ in vlm.parameters()}


def test_parts_targets_and_frozen_parts_say_where_adapters_go(random_model_folder):
    def of(frozen=(), **choice):
        return places(adapted(random_model_folder, Lora(rank=2, **choice), frozen)[0])

    language = of()
    assert language and all(".language_model.layers." in name for name in language)
    assert {n.rpartition(".")[2] for n in language} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    tower = of(parts=("vision_tower",))
    assert tower and all(".visual.blocks." in name for name in tower)
    merger = of(parts=("merger",))
    assert merger == {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
    everywhere = of(parts=("vision_tower", "merger", "language_model"))
    assert everywhere == language | tower | merger
    assert of(("vision_tower",), parts=("vision_tower", "merger", "language_model")) == language | merger
    assert of(targets=("q_proj", "v_proj")) == {n for n in language if n.endswith(("q_proj", "v_proj"))}


def test_rank_alpha_and_stabilised_scaling(random_model_folder):
    def scale(**choice):
        vlm, _ = adapted(random_model_folder, Lora(**choice))
        layer = vlm.model.model.language_model.layers[0].mlp.up_proj
        return layer.scaling["default"], layer.lora_A["default"].weight.shape[0]

    assert scale(rank=4, alpha=32) == (8.0, 4)
    assert scale(rank=16, alpha=32, rank_stabilised=True) == (8.0, 16)


def test_the_seed_decides_how_adapters_start(random_model_folder):
    starts = []
    for seed in (1, 1, 2):
        vlm = loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"))
        torch.rand(3)
        starts.append(trained(loading.prepare(vlm, LORA, (), seed=seed)))
    assert_same(starts[0], starts[1])
    assert any(not torch.equal(p, starts[2][n]) for n, p in starts[0].items())


def test_mistakes_in_the_recipe_get_a_sentence(random_model_folder, monkeypatch):
    with pytest.raises(RecipeError, match=r"(?s)no linear layer is called qproj.*there are: .*q_proj"):
        adapted(random_model_folder, Lora(rank=2, targets=("qproj",)))
    with pytest.raises(ValidationError, match=r"set lora\.rank"):
        Lora(four_bit=True)
    with pytest.raises(ValidationError, match=r"sft\.freeze leaves none of lora\.parts to train"):
        Recipe(lora={"rank": 4}, sft={"freeze": ["language_model"]})
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install bitsandbytes"):
        loading.load(Model(name=str(random_model_folder)), four_bit=True)


def test_four_bit_weights_train_and_are_saved_as_plain_ones(random_model_folder, tmp_path):
    """QLoRA for real; bitsandbytes also computes on CPUs."""
    pytest.importorskip("bitsandbytes")
    settings = Lora(rank=4, alpha=16, four_bit=True, targets=("q_proj", "v_proj"))
    plain = loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"))
    small = loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"), four_bit=True)
    vlm = loading.prepare(small, settings, (), seed=0)
    chat = loading.make_chat(vlm)
    packed = one_pack(chat)
    vlm, reference = grpo.with_reference(vlm, lambda whole: whole)
    start = logprobs(vlm, packed)
    lost = (start - logprobs(plain, packed)).abs()
    assert lost.max() > 1e-3 and lost.mean() < 0.5, "the weights are rounded, and still the model's"
    trainer = learn(vlm, packed)
    ours = logprobs(vlm, packed)
    assert (ours - start).abs().max() > 0.1 and torch.equal(logprobs(reference, packed), start)
    state = state_of.capture(vlm.model, trainer.optimizer, step=3, cursor={})
    learn(vlm, packed, steps=1)
    state_of.restore(state, vlm.model, trainer.optimizer)
    loading.save(vlm, tmp_path)
    merged = loading.load(Model(name=str(tmp_path)), device=torch.device("cpu"))
    assert merged.model.state_dict().keys() == plain.model.state_dict().keys()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(logprobs(merged, packed), logprobs(vlm, packed), rtol=1e-4, atol=1e-4)


# --- stages --------------------------------------------------------------------------------------


def run_stage(kind, source, folder, *, stop_at=None):
    """SFT or GRPO with KL, on twelve puzzles."""
    vlm, chat = adapted(source)
    problems = puzzles.load("puzzles", split="train", count=12, seed=5)
    optimizer = {"lr": 1e-3}
    if kind == "sft":
        settings = Sft(batch_size=4, epochs=1, save_every=2, optimizer=optimizer)
    else:
        kl = {"kind": "k3", "coefficient": 0.01}
        settings = Grpo(steps=3, prompts_per_step=4, group_size=3, max_new_tokens=8, save_every=2,
                        optimizer=optimizer, kl=kl)  # fmt: skip
    stage = RunDir(folder, name=kind, seed=3, settings=settings, recipe_hash="h")
    with StopFlag() as stop, screen(kind, 3, quiet=True) as view:
        watched = view if stop_at is None else Stopper(view, stop, stop_at)
        if kind == "sft":
            demonstrations = [
                Demonstration(
                    problem=p, response=puzzles.teach(p, seed=0, wrong_share=0.0), teacher="builtin"
                )
                for p in problems
            ]
            sft.train(vlm, chat, demonstrations, settings, run=stage, screen=watched, stop=stop)
        else:
            engine = LocalEngine(vlm, chat, max_rows=8)
            vlm, reference = grpo.with_reference(vlm, lambda whole: whole)
            context = GrpoContext(
                vlm=vlm, reference=reference, chat=chat, engine=engine, grader=LengthGrader()
            )
            grpo.train(context, problems, settings, run=stage, screen=watched, stop=stop)
    return trained(vlm)


def rows_of(path: Path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_stage_stopped_and_continued_equals_the_unbroken_one(random_model_folder, tmp_path, kind):
    unbroken = run_stage(kind, random_model_folder, tmp_path / "a")
    with pytest.raises(Stopped):
        run_stage(kind, random_model_folder, tmp_path / "b", stop_at=1)
    saved = Checkpoints(tmp_path / "b" / "checkpoints").load_latest()
    assert saved.model and all(".lora_" in name for name in saved.model)
    assert all(".lora_" in name for name in saved.optimizer.tensors)
    assert_same(unbroken, run_stage(kind, random_model_folder, tmp_path / "b"))
    assert rows_of(tmp_path / "a" / "metrics.jsonl") == rows_of(tmp_path / "b" / "metrics.jsonl")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "a/final" / name).read_bytes() == (tmp_path / "b/final" / name).read_bytes()
    if kind == "grpo":
        assert rows_of(tmp_path / "a" / "metrics.jsonl")[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert rows_of(tmp_path / "a" / "metrics.jsonl")[-1]["kl"] > 1e-6


def test_a_checkpoint_of_the_other_kind_is_refused(random_model_folder, vlm, tmp_path):
    ours, _ = adapted(random_model_folder)
    optimizer = Trainer(ours, Optimizer(), steps=1, max_bad_steps=1).optimizer
    full = Trainer(vlm, Optimizer(), steps=1, max_bad_steps=1).optimizer
    of_adapter = state_of.capture(ours.model, optimizer, step=1, cursor={})
    of_weights = state_of.capture(vlm.model, full, step=1, cursor={})
    with pytest.raises(CheckpointError, match="another model"):
        state_of.restore(of_adapter, vlm.model, full)
    with pytest.raises(CheckpointError, match="another model"):
        state_of.restore(of_weights, ours.model, optimizer)


def test_a_whole_study_trains_adapters_in_both_stages(random_model_folder, tmp_path, monkeypatch):
    """Stage two starts from stage one's merged weights, and they are its reference."""
    grader = WeightedSum(graders={"length": LengthGrader()}, weights={"length": 1.0})
    monkeypatch.setattr("rlcs.pipeline.graders.open_reward", lambda *_, **__: nullcontext(grader))
    recipe = load_recipe(
        "quickstart",
        [
            f"model.name={random_model_folder}",
            "study.arms=[base, sft_grpo]",
            "data.cold_start=builtin:puzzles?count=8&seed=1",
            "data.rl=builtin:puzzles?count=8&seed=2",
            "data.test=builtin:puzzles?split=test&count=6&seed=3",
            "sft.epochs=1",
            "sft.batch_size=4",
            "grpo.steps=2",
            "grpo.prompts_per_step=3",
            "grpo.group_size=2",
            "grpo.max_new_tokens=8",
            "grpo.kl={kind: k3, coefficient: 0.01}",
            "eval.max_new_tokens=8",
            "lora.rank=4",
            "sft.optimizer.lr=0.003",
        ],
    ).recipe
    assert ("LoRA", "rank 4, scale 8, on all linear layers of the language model, frozen weights") in (
        summary_rows(recipe)
    )
    folder = tmp_path / "study"
    with StopFlag() as stop:
        data = load_run_data(recipe.study, recipe.data, decode_limit=recipe.images.decode_limit)
        Study(recipe, folder, data=data, output=Output(quiet=True), stop=stop).run()
    base, stage_1, stage_2 = (
        load_file(f / "model.safetensors")
        for f in (random_model_folder, folder / "sft" / "final", folder / "sft_grpo" / "final")
    )
    changed = {name for name in base if not torch.equal(base[name], stage_1[name])}
    assert changed and all(name.startswith("model.layers.") for name in changed)  # the published names
    adapter = load_file(folder / "sft_grpo" / "final" / "adapter" / "adapter_model.safetensors")
    for name in changed:
        layer = name.replace("model.layers.", "model.language_model.layers.").removesuffix(".weight")
        a, b = (adapter[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
        assert b.abs().max() > 0
        torch.testing.assert_close(stage_2[name], stage_1[name] + 8.0 * b @ a, rtol=1e-6, atol=1e-7)
    kl = [row["kl"] for row in rows_of(folder / "sft_grpo" / "metrics.jsonl") if "kl" in row]
    assert kl and kl[0] == pytest.approx(0.0, abs=1e-6)


def test_adapters_alone_learn_a_game(random_model_folder, tmp_path):
    """GRPO with adapters raises the reward: answers should end early."""
    vlm, chat = adapted(random_model_folder, Lora(rank=16))

    class Short:
        def grade(self, pairs):
            return [Grade(reward=float(len(t) < 12), correct=len(t) < 12) for _, t in pairs]

    optimizer = {"lr": 1e-2, "betas": (0.9, 0.95)}
    settings = Grpo(steps=7, prompts_per_step=8, group_size=8, max_new_tokens=12, optimizer=optimizer)
    context = GrpoContext(
        vlm=vlm, reference=None, chat=chat, engine=LocalEngine(vlm, chat, max_rows=64), grader=Short()
    )
    stage = RunDir(tmp_path, name="grpo", seed=3, settings=settings, recipe_hash="h")
    problems = puzzles.load("puzzles", split="train", count=12, seed=5)
    with StopFlag() as stop, screen("grpo", 7, quiet=True) as view:
        grpo.train(context, problems, settings, run=stage, screen=view, stop=stop)
    rewards = [row["reward"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.2


def test_a_model_that_the_disk_has_no_room_for_is_an_error_with_a_way_out(vlm, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunFolderError, match="cannot write the model") as caught:
            loading.save(vlm, tmp_path / "final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free some space" in str(caught.value)
