"""One rank of a run whose rollouts come from vLLM: `... PROGRAM MODEL FOLDER [LORA_RANK [KEY=VALUE ...]]`."""

import json
import shutil
import sys
from pathlib import Path

import torch

from conftest import make_problem
from file_channel import FileChannel
from rlcs.distributed import join_world
from rlcs.engines.factory import open_engines
from rlcs.engines.vllm.transfer import Transfer
from rlcs.model import loading
from rlcs.pipeline.study import engine_needs
from rlcs.recipe.loading import load_recipe


def main(program: str, model: str, folder: Path, lora_rank: int, more: list[str]) -> None:
    """Rank 0 has three prompts and rank 1 one. With a `lora_rank` adapters train, each B one above zero."""
    torch.set_num_threads(1)
    words = ["rollout.engine=vllm_server", "rollout.health_limit_s=5", f"rollout.executable={program}"]
    words += [f"model.name={model}", f"lora.rank={lora_rank}", *(word for word in more if "=" in word)]
    recipe = load_recipe("quickstart", words).recipe
    with join_world(timeout_s=120) as world, open_engines(engine_needs(recipe), folder) as make:
        vlm = loading.prepare(loading.load(recipe.model, world=world), recipe.lora, (), seed=3)
        for name, parameter in vlm.parameters():
            if "lora_B" in name and world.rank == 0:
                parameter.data += 1
        vlm = loading.spread(vlm, recipe.parallel)
        chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
        engine = make(vlm, chat, 8)
        engine.sync()
        names = [f"rank{world.rank}-{i}" for i in range(3 - 2 * world.rank)]
        prompts = [chat.prompt(make_problem(name, sizes=())) for name in names]
        groups = engine.sample(prompts, chat.sampling(max_new_tokens=64, n=2))
        engine.rest()
        if send := "send" in more:
            engine._transfer = Transfer(engine._backend, FileChannel(folder, world), ranks=engine._ranks)
            engine.sync()
            groups += engine.sample(prompts, chat.sampling(max_new_tokens=64, n=2))
        found = {
            "asked": names,
            "got": [group[0].problem_id for group in groups[: len(names)]],
            "said": sorted({"".join(map(chr, rollout.ids)) for group in groups for rollout in group}),
        }
        if world.rank == 0 and not send:
            shutil.copytree(folder / "weights", folder / "published")
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int((sys.argv[4:] or ["0"])[0]), sys.argv[5:])
