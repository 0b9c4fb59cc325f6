"""A chat with a target: turns that are kept, and answers written with speculative decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.generations import Generation, Round
from drafttrain.core.proposals import Context
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.eval.answer_text import AnswerText
from drafttrain.eval.arms import Arm
from drafttrain.eval.result import Piece
from drafttrain.target_model import Target

Turn = dict[str, str]


@dataclass
class Conversation:
    """A chat whose answers an arm decodes."""

    arm: Arm
    system: str | None = None
    """The system prompt; None: the chat template's own."""
    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str, show: Callable[[Piece], None]) -> Generation:
        """Answer a question; question and answer become turns, also of an answer that Ctrl-C ends early.

        Args:
            show: Called with every part of the answer, while it is written.

        Raises:
            DataError: The target has no chat template, or the template refuses the chat.
            CheckpointError: The chat is too long for the target.
        """
        asked = [*self.turns, {"role": "user", "content": question}]
        prompt, answer = self._prompt(asked), AnswerText(self.arm.target.tokenizer)

        def on_round(context: Context, round: Round) -> None:
            for piece in answer.of_round(context, round):
                show(piece)

        try:
            (generation,) = self.arm.engine.generate([prompt], on_round=on_round)
            if rest := answer.rest():
                show(Piece(rest, drafted=False))
        finally:
            if answer.text:
                self.turns = [*asked, {"role": "assistant", "content": answer.text}]
        return generation

    def _prompt(self, turns: Sequence[Turn]) -> Prompt:
        prompt = chat_prompt(turns, self.arm.target, system=self.system)
        most = len(prompt.tokens) + self.arm.engine.max_new_tokens
        self.arm.target.check_length(most, what="this chat with its next answer")
        return prompt


def check_can_chat(tokenizer: Any, *, name: str) -> None:
    """Refuse a target without a chat template.

    Raises:
        DataError: Naming the target.
    """
    if not Encoder(tokenizer, max_length=1 << 20).template.exists:
        raise DataError(f"{name}: its tokenizer has no chat template, so it cannot chat. Use a chat model")


def chat_prompt(turns: Sequence[Turn], target: Target, *, system: str | None = None) -> Prompt:
    """Return a chat as the target reads it before it answers; its random streams are named by the number of the turn.

    Raises:
        DataError: The target has no chat template, or the template refuses the chat.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    check_can_chat(target.tokenizer, name=target.name)
    try:
        tokens = Encoder(target.tokenizer, max_length=1 << 20).chat_ids(
            [*first, *turns], {}, add_generation_prompt=True
        )
    except BadItem as error:
        raise DataError(f"{target.name}: {error}") from error
    return Prompt(f"turn {len(turns)}", tokens)
