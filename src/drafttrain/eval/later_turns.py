"""Later questions of a conversation: each follows the target's own answer to the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.chat import Chat
from drafttrain.data_gen.chat_template import ChatTemplate
from drafttrain.target_model import Target


def next_prompts(
    prompts: Sequence[Prompt], answers: Sequence[Generation], target: Target, *, max_new_tokens: int
) -> list[Prompt]:
    """Return the prompts of the next turn, for the conversations that have one.

    Args:
        answers: The target's own outputs for the prompts.

    Raises:
        DataError: The chat template refuses the conversation.
        CheckpointError: With its next answer it is too long for the target.
    """
    found = [_next(prompt, one, target) for prompt, one in zip(prompts, answers, strict=True) if prompt.questions]
    for prompt in found:
        target.check_length(len(prompt.tokens) + max_new_tokens, what=f"prompt {prompt.id} with eval.max_new_tokens")
    return found


def most_prompt_tokens(prompt: Prompt, target: Target, *, max_new_tokens: int) -> int:
    """Return the tokens that the prompt of the conversation's last turn has, if every answer has as many as it may."""
    last, template = prompt, ChatTemplate(target.tokenizer)
    while last.questions:
        last = _asked(last, "", template)
    return len(last.tokens) + len(prompt.questions) * max_new_tokens


def questions_of(prompt: Prompt, tokenizer: Any) -> list[Sequence[int]]:
    """Return the tokens of each question of a conversation, the later ones as if they were asked first.

    Raises:
        DataError: The chat template refuses a question.
    """
    template = ChatTemplate(tokenizer)
    found = [prompt.tokens]
    for turn, question in enumerate(prompt.questions, prompt.turn + 1):
        asked = replace(prompt.chat, turns=[{"role": "user", "content": question}], trained=[False])
        found.append(_tokens(template, asked, prompt, turn))
    return found


def _next(prompt: Prompt, answer: Generation, target: Target) -> Prompt:
    text = target.tokenizer.decode(list(answer.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return _asked(prompt, text, ChatTemplate(target.tokenizer))


def _asked(prompt: Prompt, answer: str, template: ChatTemplate) -> Prompt:
    """Return the prompt of the next question, after this answer."""
    question, *later = prompt.questions
    turns = [
        *prompt.chat.turns,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]
    chat = replace(prompt.chat, turns=turns, trained=[False] * len(turns))
    turn = prompt.turn + 1
    return replace(
        prompt,
        id=f"{prompt.unit} turn {turn}",
        tokens=_tokens(template, chat, prompt, turn),
        answer="",
        turn=turn,
        conversation=prompt.unit,
        questions=later,
        chat=chat if later else None,
    )


def _tokens(template: ChatTemplate, chat: Chat, prompt: Prompt, turn: int) -> list[int]:
    try:
        return template.prompt(chat)
    except BadItem as error:
        raise DataError(f"prompt {prompt.unit}, turn {turn}: {error}") from error
