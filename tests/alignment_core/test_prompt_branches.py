"""With every kind of chat template, a principled prompt equals the base plus the principle, token by token."""

import copy
import itertools

import pytest
from tokenizers import Regex, normalizers
from transformers import AddedToken

from linalign import InvalidRequest, Principle
from linalign.alignment_core.text.chat_template import Rendering
from linalign.alignment_core.text.prompts import PromptBuilder
from tests.alignment_core import test_prompts
from tests.counts import counted

GEMMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
GEMMA_3 = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first }}{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.first and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ text.strip() }} [/INST]{% else %} {{ text.strip() }} {% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}<start>{{ m['role'] }}<end>\n\n{{ m['content'] | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant<end>\n\n{% endif %}"
)
MISTRAL = (  # system text goes into the last user message, but only if that is the last message
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}[INST] {{ system + '\n\n' + m['content'] }}[/INST]"
    "{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}"
    "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endfor %}"
)
TRIMS_USERS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | trim if m['role'] == 'user' else m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TRIMS_SYSTEM = TRIMS_USERS.replace("== 'user'", "== 'system'")
DEFAULT = (  # a default system message, also in place of an empty one
    "{% set ns = namespace(text='You are a helpful model.') %}{% for m in messages if m['role'] == 'system' and "
    "m['content'] %}{% set ns.text = m['content'] %}{% endfor %}<|im_start|>system\n{{ ns.text }}<|im_end|>\n"
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
TEMPLATES = {
    "smollm2": None,
    "plain": test_prompts.PLAIN,
    "refuses system": test_prompts.REFUSES_SYSTEM,
    "drops system": test_prompts.DROPS_SYSTEM,
    "merges system": test_prompts.MERGES_SYSTEM,
    "date": test_prompts.WITH_DATE,
    "trims all": test_prompts.TRIMMING,
    "tools": test_prompts.KNOWS_MORE,
    "trims users": TRIMS_USERS,
    "trims system": TRIMS_SYSTEM,
    "default": DEFAULT,
    "gemma 2": GEMMA_2,
    "gemma 3": GEMMA_3,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
}
SHAPES = [("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user")]
ENDS = ["", " \n\n ", "\u3000\u2003", *counted([], [" ", "\n", "\u00a0", "\t"])]
SAID = {"system": "Be kind.", "user": "What is rain?", "assistant": "Rain is water."}
PRINCIPLE = "Speak 1 simply."


def chats():
    """Chats with white space around the text of one message or of all, or with nothing else in one."""
    for roles in SHAPES:
        plain = [{"role": role, "content": SAID[role]} for role in roles]
        for index, (before, after) in itertools.product(range(len(roles)), itertools.product(ENDS, ENDS)):
            yield [{**m, "content": before + m["content"] + after} if i == index else m for i, m in enumerate(plain)]
        for end in ENDS:
            yield [{**m, "content": end + m["content"] + end} for m in plain]
            for index in range(len(roles)):
                yield [{**m, "content": end} if i == index else m for i, m in enumerate(plain)]


@pytest.mark.parametrize("placement", ["system", "user"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_principle_is_the_only_difference(tokenizer, name, placement):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = TEMPLATES[name] or tokenizer.chat_template
    prompts = PromptBuilder(tokenizer)
    num_placed = 0
    for chat in chats():
        continued = chat[-1]["role"] == "assistant"
        plain = prompts.build(chat, rendering=Rendering(continues=continued)).principled[0]
        prompt = prompts.build(chat, [Principle(PRINCIPLE)], placement, Rendering(continues=continued))
        assert prompt.base == plain, chat
        principled, base = (tokenizer.decode(ids) for ids in (prompt.principled[0], prompt.base))
        before, after = principled.split(PRINCIPLE)
        remainder = without_joints(before, after, base)
        assert remainder is not None, (chat, principled, base)
        assert tuple(tokenizer.encode(remainder, add_special_tokens=False)) == prompt.base
        num_placed += 1
    assert num_placed > counted(100, 500)


def without_joints(before, after, base):
    """The text without the principle, its separators, and a block made only for it; None if that is not `base`."""
    for lead, trail in [("\n", ""), ("", "\n\n"), ("", "\n"), ("\n", "\n"), ("", ""), ("\n\n\n", "")]:
        if before.endswith(lead) and after.startswith(trail):
            rest = before.removesuffix(lead) + after.removeprefix(trail)
            if rest == base:
                return rest
    for block in (
        "<|im_start|>system\n{}<|im_end|>\n",
        "<start>system<end>\n\n{}<eot>",
        "<<SYS>>\n{}\n<</SYS>>\n\n",
        "<<SYS>>\n{}\n<</SYS>>",
    ):
        lead, trail = block.split("{}")
        if before.endswith(lead) and after.startswith(trail):
            rest = before.removesuffix(lead) + after.removeprefix(trail)
            if rest == base:
                return rest
    return None


@pytest.mark.parametrize(
    ("name", "chat"),
    [
        ("mistral", [*({"role": r, "content": SAID[r]} for r in ("system", "user", "assistant"))]),
        ("mistral", [*({"role": r, "content": SAID[r]} for r in ("user", "assistant"))]),
    ],
)
def test_a_principle_goes_into_the_user_message_if_the_template_drops_system_text(tokenizer, name, chat):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    prompt = PromptBuilder(tokenizer).build(chat, [Principle(PRINCIPLE)], rendering=Rendering(continues=True))
    principled, base = (tokenizer.decode(ids) for ids in (prompt.principled[0], prompt.base))
    assert principled == base.replace("What is", f"{PRINCIPLE}\n\nWhat is")


@pytest.mark.parametrize("name", ["gemma 3", "llama 2"])
def test_a_principle_that_the_template_never_shows_is_refused(tokenizer, name):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    with pytest.raises(InvalidRequest, match="no place for a principle") as error:
        PromptBuilder(tokenizer).build([{"role": "system", "content": "Be kind."}], [Principle(PRINCIPLE)])
    assert error.value.field == "principles"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{{ m['content'] }}\n{% endfor %}",  # repeats texts
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}{{ messages | length }} messages, "
        "{{ messages | map(attribute='content') | join | length }} letters",
    ],
)
def test_a_template_that_changes_other_text_is_refused(tokenizer, template):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(InvalidRequest, match="no place for a principle"):
        PromptBuilder(tokenizer).build([{"role": "user", "content": "Hello"}], [Principle(PRINCIPLE)])


def test_a_principle_without_tokens_is_refused(tokenizer):
    dropping = copy.deepcopy(tokenizer)
    dropping.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(InvalidRequest, match="adds no tokens"):
        PromptBuilder(dropping).build([{"role": "user", "content": "Hello"}], [Principle("\u200b\u200b")], "user")
    with pytest.raises(InvalidRequest, match="adds no tokens"):
        PromptBuilder(dropping).build_text("Hello", [Principle("\u200b")])


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("m['content'] | tojson", '"Be kind.\\nSay \\"hi\\"\\nor not"'),
        ("m['content'] | upper", 'BE KIND.\nSAY "HI"\nOR NOT'),
        ("m['content'] | replace('\n', '|')", 'Be kind.|Say "hi"|or not'),
        ("'told to say hi' if 'hi' in m['content'] else m['content']", None),
    ],
)
def test_a_principle_is_rendered_like_other_text(tokenizer, how, shown):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        f"{{% for m in messages %}}<start>{{{{ m['role'] }}}}\n{{{{ {how} }}}}<end>\n{{% endfor %}}"
    )
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Rain?"}]
    prompt = PromptBuilder(tokenizer).build(chat, [Principle('Say "hi"\nor not')])
    principled, base = (tokenizer.decode(ids) for ids in (prompt.principled[0], prompt.base))
    if shown is None:  # the template would change the text around the principle
        assert principled == base.replace("Be kind.", 'Be kind.\nSay "hi"\nor not')
    else:
        assert principled == f"<start>system\n{shown}<end>\n" + base[base.index("<start>user") :]


def test_reasoning_that_a_template_removes_stays_removed(tokenizer):
    """Also if the reasoning mentions a token that replies may contain, and its end mark is not a token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.chat_template = TEMPLATES["plain"].replace("m.content", "m.content.split('</think>')[-1]")
    reply = "<think>\nShall I use <tool_call>? No, 1 < 2 | 3 > 2.</think>Rain is <b>water</b>."
    chat = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "?"},
    ]
    prompt = PromptBuilder(tokenizer).build(chat)
    official = tokenizer.apply_chat_template(chat, return_dict=False, add_generation_prompt=True)
    assert prompt.principled[0] == tuple(official)
    assert "Shall" not in tokenizer.decode(prompt.principled[0])


def test_a_template_that_shows_no_system_message_beside_tools(tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}"
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}{% endif %}"
    )
    tokenizer.chat_template += TEMPLATES["plain"]
    tool = {"type": "function", "function": {"name": "w", "parameters": {}}}
    chat = [{"role": "user", "content": "Rain?"}]
    prompt = PromptBuilder(tokenizer).build(chat, [Principle(PRINCIPLE)], rendering=Rendering(tools=[tool]))
    assert f"user\n{PRINCIPLE}\n\nRain?" in tokenizer.decode(prompt.principled[0])


def test_a_principle_that_the_template_would_remove_is_inserted(tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = TEMPLATES["plain"].replace("m.content", "m.content | replace('/think', '')")
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Rain?"}]
    prompt = PromptBuilder(tokenizer).build(chat, [Principle("/think")])
    principled, base = (tokenizer.decode(ids) for ids in (prompt.principled[0], prompt.base))
    assert principled == base.replace("Be kind.", "Be kind.\n/think")


@pytest.mark.parametrize("content", ["", " ", "\n\n", "\u00a0"])
def test_a_system_message_of_white_space_is_a_place_for_a_principle(tokenizer, content):
    tokenizer = copy.copy(tokenizer)
    for name in ("plain", "trims all", "llama 3"):
        tokenizer.chat_template = TEMPLATES[name]
        chat = [{"role": "system", "content": content}, {"role": "user", "content": "Rain?"}]
        principled = tokenizer.decode(PromptBuilder(tokenizer).build(chat, [Principle(PRINCIPLE)]).principled[0])
        assert (
            principled.index("system")
            < principled.index(PRINCIPLE)
            < principled.index("user\n" if name != "llama 3" else "user<")
        )


@pytest.mark.parametrize("placement", ["system", "user"])
def test_messages_of_calls_need_no_text(tokenizer, placement):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {}}}
    calls = [{"role": "assistant", "tool_calls": [call], **content} for content in ({}, {"content": None})]
    chat = [*calls, {"role": "tool", "content": "rain"}, {"role": "user", "content": "And now?"}]
    prompts = PromptBuilder(tokenizer)
    prompt = prompts.build(chat, [Principle(PRINCIPLE)], placement)
    assert prompt.base == prompts.build(chat).principled[0]
    assert PRINCIPLE in tokenizer.decode(prompt.principled[0])
    for role in ("system", "user", "tool"):
        with pytest.raises(InvalidRequest, match=f"of the role {role} must be text") as error:
            prompts.build([{"role": role, "content": None}, *chat])
        assert error.value.field == "messages"


def test_a_principle_that_the_tokenizer_merges_into_its_neighbours_is_refused(tokenizer):
    merging = copy.deepcopy(tokenizer)
    spaces = [normalizers.Replace("\u200b", " "), normalizers.Replace(Regex("[ \n]+"), " ")]
    merging.backend_tokenizer.normalizer = normalizers.Sequence(spaces)
    with pytest.raises(InvalidRequest, match="adds no tokens"):
        PromptBuilder(merging).build([{"role": "user", "content": "Hello "}], [Principle("\u200b")], "user")
