"""Prompts from segments: equal to the model's own template on clean text, unforgeable otherwise."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import draw, make_conversation, make_problem
from rlcs.data.images import open_image
from rlcs.errors import DataError, ImageError, PromptError
from rlcs.model import chat as chat_module
from rlcs.model import loading
from rlcs.model.chat import RECENT_LENGTH, default_system, set_default_system
from rlcs.model.chat_format import CHATML
from rlcs.model.families.qwen2_vl import DEFAULT_SYSTEM
from rlcs.recipe.schema import Images, Model, Prompts, Recipe
from rlcs.records import ImageRef, Message, Problem, Prompt, Request, Turn


def template_ids(vlm, problem, system):
    """What the processor makes of the same messages through its own chat template."""
    content = []
    pieces = problem.question.split("<image>")
    if len(pieces) == 1:
        pieces = [""] * len(problem.images) + pieces
    for number, piece in enumerate(pieces):
        content += [{"type": "text", "text": piece}] if piece else []
        content += [{"type": "image"}] if number < len(problem.images) else []
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [open_image(ref, limit=10**6) for ref in problem.images] or None
    return vlm.processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist()


@pytest.mark.parametrize("system", ["Put it in \\boxed{}.", None, "\n  odd\n\nspaces \n"])
@pytest.mark.parametrize(
    ("question", "sizes"),
    [
        ("How many red circles are there?", ((84, 84),)),
        ("\nbegins with a new line, ends with blanks  \n", ((56, 84),)),
        ("<image>Compare with <image>\nand say why.", ((84, 56), (112, 84))),
        ("just text: 3 + 5 = ?", ()),
        ("Ünïcode ½ 数学", ((84, 84),)),
    ],
)
def test_clean_text_gives_the_ids_of_the_chat_template(vlm, question, sizes, system):
    chat = loading.make_chat(vlm, prompts=Prompts(system=None))
    problem = make_problem("p", question, sizes)
    assert list(chat.with_system(system).prompt(problem).ids) == template_ids(vlm, problem, system)


def template_messages(problem):
    """The conversation of a problem as the processor's template takes it."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, ImageRef) else {"type": "text", "text": part}
                for part in message.parts
            ],
        }
        for message in Request.of(problem).messages
    ]


@pytest.mark.parametrize("system", [None, "Be brief.\nAlways."])
@pytest.mark.parametrize("choices", [(), ("two", "five")])
def test_a_conversation_gives_the_ids_of_the_chat_template(vlm, system, choices):
    chat = loading.make_chat(vlm, prompts=Prompts(system=None))
    problem = make_conversation("p", system=system, choices=choices)
    text = vlm.processor.apply_chat_template(
        template_messages(problem), tokenize=False, add_generation_prompt=True
    )
    images = [open_image(ref, limit=10**6) for ref in problem.images]
    ids = vlm.processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist()
    prompt = chat.prompt(problem)
    assert list(prompt.ids) == ids and len(prompt.images) == 3
    replies = ["".join(map(chat.token, prompt.ids[start:end])) for start, end in prompt.replies]
    end = vlm.family.chat_format.turn_end
    assert "".join(replies) == f"I count two.\n\\boxed{{2}}{end}Three: \\boxed{{3}}{end}"


def test_what_an_assistant_wrote_has_the_ids_that_it_was_sampled_with(chat):
    reply = "\n\n  begins with new lines"
    history = (Turn(role="user", text="a"), Turn(role="assistant", text=reply))
    prompt = chat.prompt(Problem(id="p", source="t", question="b", answer="1", history=history))
    written = [i for start, end in prompt.replies for i in prompt.ids[start:end]]
    assert tuple(written) == chat.response_ids(reply)
    before = chat.prompt(Problem(id="p", source="t", question="a", answer="1")).ids
    assert prompt.ids[: len(before)] == before


def test_the_system_turn_of_a_row_is_used_instead_of_the_recipes(vlm):
    chat = loading.make_chat(vlm, prompts=Prompts(system="the recipe's"))
    shown = "".join(map(chat.token, chat.prompt(make_conversation("p", system="the row's")).ids))
    assert "the row's" in shown and "the recipe's" not in shown
    assert "the recipe's" in "".join(map(chat.token, chat.prompt(make_conversation("p")).ids))


def test_an_over_long_conversation_says_that_its_turns_count(vlm):
    chat = loading.make_chat(vlm, prompts=Prompts(max_tokens=50))
    with pytest.raises(PromptError, match="with 4 turns before the question; the limit is 50"):
        chat.prompt(make_conversation("p", system="s"))


@pytest.mark.fault("data", "control tokens typed into any field", "plain text")
@given(st.lists(st.integers(0, 999), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_typed_control_tokens_stay_text(chat_once, chosen):
    control = chat_once._tokenizer.all_special_tokens
    pieces = [*control, "a ", "\n", "system\n"]
    typed = "x" + "".join(pieces[number % len(pieces)] for number in chosen)
    clean = Problem(id="c", source="t", question="x", answer="1", images=(draw(56, 56),))
    forged = Problem(id="f", source="t", question=typed, answer="1", images=(draw(56, 56),), choices=(typed,))
    controls = set(chat_once._tokenizer.all_special_ids)

    def count(prompt):
        return [i for i in prompt.ids if i in controls]

    assert count(chat_once.with_system(typed).prompt(forged)) == count(
        chat_once.with_system("s").prompt(clean)
    )
    assert controls.isdisjoint(chat_once.text_ids(typed))


@pytest.fixture(scope="module")
def chat_once(random_model_folder):
    vlm = loading.load(Recipe(model={"name": str(random_model_folder)}).model)
    return loading.make_chat(vlm)


def test_text_survives_the_round_trip(chat):
    text = "row 1: red circle\n\\boxed{12} <|im_end|> é"
    ids = chat.response_ids(text)
    assert ids[-1] == chat.end_id
    assert chat.text(ids[:-1]) == text


def test_an_over_long_prompt_names_its_length_and_the_key(vlm):
    chat = loading.make_chat(vlm, prompts=Prompts(max_tokens=20))
    with pytest.raises(
        PromptError, match=r"problem-9: the prompt has \d+ tokens, 6 of them image; the limit is 20"
    ):
        chat.prompt(make_problem("problem-9"))


def test_what_stands_in_every_prompt_is_tokenised_once(vlm, monkeypatch):
    chat, plain = (loading.make_chat(vlm, Prompts(system="Think first.")) for _ in range(2))
    texts, tokenizer = [], chat._tokenizer

    def counting(together, **options):
        texts.extend(together)
        return tokenizer(together, **options)

    monkeypatch.setattr(chat, "_tokenizer", counting)
    problems = [make_problem(name, f"How many are {name}?") for name in "ab"]
    assert [chat.prompt(p).ids for p in problems] == [plain.prompt(p).ids for p in problems]
    assert len(texts) == len(set(texts)) and sum("How many" in text for text in texts) == 2
    ids = chat.text_ids("How many")
    ids.append(0)
    assert chat.text_ids("How many") == ids[:-1], "the caller's list is its own"
    texts.clear()
    for _ in range(2):
        chat.text_ids("x" * (RECENT_LENGTH + 1))
    assert len(texts) == 2, "long texts are not kept"


@pytest.mark.fault("limits", "an endless text", "refused before all of it is read")
def test_an_endless_text_is_refused_before_all_of_it_is_tokenised(vlm, monkeypatch):
    chat, seen = loading.make_chat(vlm, prompts=Prompts(max_tokens=3000)), []
    tokenise = chat.text_ids
    monkeypatch.setattr(chat, "text_ids", lambda text: seen.append(len(text)) or tokenise(text))
    with pytest.raises(PromptError, match="more than 6000 tokens; the limit is 3000"):
        chat.prompt(make_problem("endless", question="word " * 1_000_000, sizes=()))
    assert sum(seen) < 10**5
    long = " " * 200_000 + "x"  # of few tokens, if the tokenizer has long ones
    monkeypatch.setattr(chat, "text_ids", lambda text: tokenise(text)[: len(text) >> 12])
    assert len(chat.prompt(make_problem("long", question=long, sizes=())).ids) < 3000


def test_prompts_made_together_are_those_made_one_by_one(vlm, monkeypatch):
    chat = loading.make_chat(vlm, Prompts(max_tokens=300))
    problems = [
        make_problem("a"),
        make_conversation("b", system="Be brief.", choices=("three", "four")),
        make_problem("long", question="word " * 400, sizes=()),
        make_problem("endless", question="x" * (chat_module.SLICE + 1), sizes=()),
        replace(make_problem("shape"), images=(ImageRef(sha256="0" * 64, width=9, height=4000, data=b""),)),
        make_problem("c", question="How many?", sizes=()),
    ]

    def alone(problem):
        try:
            return chat.prompt(problem)
        except DataError as error:
            return str(error)

    calls, tokenised = [], chat._ids_of
    monkeypatch.setattr(chat, "_ids_of", lambda texts: calls.append(len(texts)) or tokenised(texts))
    together = chat.unchecked_prompts(problems)
    assert calls[0] > 5 and all(count == 1 for count in calls[1:]), "what is endless is read in slices"
    assert [each if isinstance(each, Prompt) else str(each) for each in together] == list(
        map(alone, problems)
    )
    assert [type(each) for each in together].count(Prompt) == 3


def test_pixel_bounds_of_the_recipe_decide_the_image_tokens(vlm):
    small = loading.make_chat(vlm, images=Images(min_pixels=3136, max_pixels=56 * 56))
    span = small.prompt(make_problem("p", sizes=((280, 280),))).spans[0]
    assert span[1] - span[0] == 4
    large = loading.make_chat(vlm, images=Images(min_pixels=112 * 112, max_pixels=224 * 224))
    span = large.prompt(make_problem("p", sizes=((28, 28),))).spans[0]
    assert span[1] - span[0] == 16


def test_an_absurd_shape_is_an_image_error(chat, tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (2000, 4)).save(path)
    from rlcs.data.images import image_from_bytes

    with pytest.raises(ImageError):
        ref = image_from_bytes(path.read_bytes(), limit=10**6, where="thin.png")
        chat.prompt(Problem(id="thin", source="t", question="q", answer="1", images=(ref,)))


def test_choices_are_listed_with_letters(chat):
    problem = Problem(id="m", source="t", question="Which?", answer="B", choices=("one", "two"))
    assert "Which?\n(A) one\n(B) two" in chat.text(chat.prompt(problem).ids)


def test_sampling_bans_what_stands_for_images(chat):
    sampling = chat.sampling(max_new_tokens=4)
    assert chat.image_id in sampling.banned_ids and chat.end_id in sampling.stop_ids
    assert DEFAULT_SYSTEM in chat.text(chat.with_system(None).prompt(make_problem("p")).ids)


def test_several_turns_give_the_ids_of_the_chat_template(vlm):
    chat = loading.make_chat(vlm, prompts=Prompts(system=None))
    first, second = draw(56, 84), draw(84, 84)
    turns = [
        Message(role="user", parts=("Compare ", first, " and ", second, ".")),
        Message(role="assistant", parts=("They differ.",)),
        Message(role="user", parts=(second, "Why?")),
    ]
    for system in ((), (Message(role="system", parts=("Be brief.",)),)):
        messages = [*system, *turns]
        ids = chat.conversation(messages, name="c").ids
        assert list(ids) == rendered_ids(vlm.processor, messages)


def rendered_ids(processor, messages):
    """The ids of messages by the processor's own template."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for message in messages
        for part in message.parts
    ]
    shared = iter(parts)
    dicts = [{"role": m.role, "content": [next(shared) for _ in m.parts]} for m in messages]
    text = processor.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    refs = [part for message in messages for part in message.parts if isinstance(part, ImageRef)]
    images = [open_image(ref, limit=10**6) for ref in refs] or None
    return processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist()


@pytest.mark.parametrize("system", ["Put it in \\boxed{}.", "a 'b' \"c\" {{ d }} {% e %}\n\nü 数 \U0001f600"])
def test_the_system_prompt_is_saved_with_the_model(vlm, tmp_path, system):
    assert default_system(vlm.processor, CHATML) == DEFAULT_SYSTEM
    chat = loading.make_chat(vlm, prompts=Prompts(system=system))
    loading.save(vlm, tmp_path)
    loaded = loading.load(Model(name=str(tmp_path)))
    assert default_system(loaded.processor, CHATML) == system
    turn = Message(role="user", parts=(draw(56, 56), "How many?"))
    assert list(chat.conversation([turn], name="c").ids) == rendered_ids(loaded.processor, [turn])
    own = [Message(role="system", parts=("Other.",)), turn]
    assert list(chat.conversation(own, name="c").ids) == rendered_ids(loaded.processor, own)
    set_default_system(loaded.processor, "changed", CHATML)
    assert default_system(loaded.processor, CHATML) == "changed"


def test_a_token_has_its_own_bytes(vlm):
    chat = loading.make_chat(vlm)
    for text in ("Hm? 🙂🙃 é ½ 数学\n\t \u00ad\u00a0\u0142", "".join(map(chr, range(0x180)))):
        ids = chat.text_ids(text)
        assert b"".join(map(chat.token_bytes, ids)) == text.encode()
    smile = [chat.token_bytes(index) for index in chat.text_ids("🙂")]
    assert len(smile) > 1 and smile[0][0] == 240
    assert chat.token_bytes(chat.end_id) == b"", "the text has nothing of it"
