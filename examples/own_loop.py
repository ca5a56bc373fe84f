"""GRPO in your own loop, on the built-in model and puzzles: `python examples/own_loop.py`."""

import torch

import rlcs

PROMPTS, ANSWERS = 16, 8


def clipped_loss(batch: rlcs.Batch, scores: rlcs.Scores) -> rlcs.LossSums:
    """PPO's clipped objective; the trainer divides the sum by the tokens of the whole step."""
    pack = batch.pack.to(scores.logprobs.device)
    assert pack.sampler_logprobs is not None, "every branch below has them"
    ratio = (scores.logprobs - pack.sampler_logprobs).exp()
    gain = torch.minimum(ratio * pack.weights, ratio.clamp(0.8, 1.28) * pack.weights)
    tokens, sequences = torch.tensor(pack.num_targets), torch.tensor(pack.num_sequences)
    return rlcs.LossSums(loss=-gain.sum(), tokens=tokens, sequences=sequences, sums={}, maxima={})


def main(steps: int = 30) -> list[float]:
    """Train; the mean reward of every step, which is also printed."""
    policy, chat = rlcs.load_policy("builtin")
    problems = rlcs.load_problems(f"builtin:puzzles?split=train&count={PROMPTS * steps}&seed=1&levels=1")
    sampler = rlcs.LocalEngine(policy, chat, max_rows=PROMPTS * ANSWERS)
    sampling = chat.sampling(n=ANSWERS, max_new_tokens=48, seed=0)
    optimizer = rlcs.Optimizer(lr=3e-4, warmup_steps=5)
    trainer = rlcs.Trainer(policy, optimizer, steps=steps, max_bad_steps=3)
    means = []
    with rlcs.GradePool() as grader:
        for step in range(steps):
            asked = problems[step * PROMPTS : (step + 1) * PROMPTS]
            prompts = [chat.prompt(problem) for problem in asked]
            groups = sampler.sample(prompts, sampling, step=step)
            trees, rewards = [], []
            for problem, prompt, answers in zip(asked, prompts, groups, strict=True):
                grades = grader.grade([(problem, answer.text) for answer in answers])
                rewards += [grade.reward or 0.0 for grade in grades]
                advantages = rlcs.advantages([grade.reward for grade in grades], "grpo")
                branches = [
                    rlcs.Branch(ids=a.ids, weights=(better,) * len(a.ids), logprobs=a.logprobs)
                    for a, better in zip(answers, advantages, strict=True)
                    if better is not None
                ]
                trees.append(rlcs.Tree(prompt=prompt, branches=tuple(branches)))
            batch = rlcs.Batch(pack=rlcs.pack(trees, chat.patches))
            result = trainer.step([batch], clipped_loss, average="token")
            means.append(sum(rewards) / len(rewards))
            print(f"step {step + 1}: reward {means[-1]:.3f}, loss {result.loss:+.4f}")
    return means


if __name__ == "__main__":
    main()
