"""Which draft tokens matter: those that change the answer when they replace the target's token.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record, Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.data_gen.annotate import Frozen, JudgeLabelSettings, annotators
from drafttrain.data_gen.annotate.states import states_of
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.checkers import Checker, checkers
from drafttrain.data_gen.packing import pack
from drafttrain.heads.rows import HeadRows


@dataclass(kw_only=True)
class CounterfactualSettings(JudgeLabelSettings):
    """Replaces each token at which the drafter disagrees, lets the target continue, and compares the answers."""

    checker: Any = setting(help="How the answer is read from a text, by kind.", registry=checkers)
    max_new_tokens: int = setting(256, help="Most new tokens of an answer.", ge=1)
    max_mismatches: int = setting(64, help="Most draft tokens that are tried in a text.", ge=1)


@dataclass
class _Walk:
    """The state of one text."""

    id: str
    prompt: list[int]
    new: list[int]
    answer: Hashable
    place: int = 0
    """First new token that was not examined yet."""
    tried: list[list[int]] = field(default_factory=list)
    """For each row: the text up to its draft token, included."""
    labels: list[float] = field(default_factory=list)


@annotators.register("counterfactual", CounterfactualSettings)
class Counterfactual:
    """Visits the places where drafter and target disagree, both greedy, from the first to the last.

    At each place the drafter's token is inserted and the target continues. If the answer stays the same, the token does not
    matter (label 1) and the walk continues in the new text, as decoding would. If it changes, the token matters (label 0) and
    the target's token stays. So no row follows a token that mattered. Texts without a checkable answer are skipped.

    Source: Garipov et al. 2025, AutoJudge, arXiv 2504.20039, 3.1.
    """

    for_head: ClassVar[str] = "judge"

    def __init__(self, settings: CounterfactualSettings, frozen: Frozen) -> None:
        self.settings = settings
        self.frozen = frozen
        self.checker: Checker = checkers.build(settings.checker)

    @torch.no_grad()
    def label(self, records: Sequence[Record]) -> list[HeadRows]:
        """Return the rows of each record; only the tokens before its first label are used, as the prompt."""
        walks = self.walks(records)
        tried = [text for walk in walks for text in walk.tried]
        records_tried = [Record("", text, [True] * len(text)) for text in tried]
        last = [states_TD[-1:] for states_TD in states_of(records_tried, self.frozen)]
        width = self.frozen.target.model.get_output_embeddings().weight.shape[1]
        states_ND = torch.cat([torch.zeros(0, width), *last])
        labels_N = torch.tensor([label for walk in walks for label in walk.labels])
        sizes = [len(walk.tried) for walk in walks]
        return [HeadRows(*part) for part in zip(states_ND.split(sizes), labels_N.split(sizes), strict=True)]

    def walks(self, records: Sequence[Record]) -> list[_Walk]:
        """Return the finished walk of each record."""
        prompts = [list(record.tokens[: _first_label(record)]) for record in records]
        written = self._write([record.id for record in records], prompts)
        walks = [
            _Walk(record.id, prompt, new, self._answer(record.id, new))
            for record, prompt, new in zip(records, prompts, written, strict=True)
        ]
        going = [walk for walk in walks if walk.answer is not None]
        for _ in range(self.settings.max_mismatches):
            going = self._try_next(going)
            if not going:
                break
        return walks

    def _try_next(self, walks: Sequence[_Walk]) -> list[_Walk]:
        """Label the next disagreement of every text; return the texts that had one."""
        going: list[_Walk] = []
        tokens: list[int] = []
        for walk, drafted in zip(walks, self._drafted(walks), strict=True):
            pairs = list(enumerate(zip(drafted, walk.new, strict=True)))[walk.place :]
            for place, (token, own) in pairs:
                if token is not None and token != own:
                    walk.place = place
                    going.append(walk)
                    tokens.append(token)
                    break
        starts = [[*walk.prompt, *walk.new[: walk.place], token] for walk, token in zip(going, tokens, strict=True)]
        ends = self.frozen.target.eos_token_ids
        open_ = [i for i, token in enumerate(tokens) if token not in ends]
        written = self._write([going[i].id for i in open_], [starts[i] for i in open_])
        rest_of = dict(zip(open_, written, strict=True))
        for i, (walk, start) in enumerate(zip(going, starts, strict=True)):
            new = [*start[len(walk.prompt) :], *rest_of.get(i, [])][: self.settings.max_new_tokens]
            same = self._answer(walk.id, new) == walk.answer
            walk.tried.append(start)
            walk.labels.append(float(same))
            walk.new = new if same else walk.new
            walk.place += 1
        return going

    def _write(self, ids: Sequence[str], starts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the target's greedy continuation of each start."""
        if not starts:
            return []
        tasks = [Task(id, start, Sampling()) for id, start in zip(ids, starts, strict=True)]
        return continuations(
            tasks, self.frozen.target, max_new_tokens=self.settings.max_new_tokens, seed=self.frozen.seed
        )

    def _answer(self, id: str, new: Sequence[int]) -> Hashable | None:
        text = self.frozen.target.tokenizer.decode(list(new), skip_special_tokens=True)
        return self.checker.answer(text, id=id)

    def _drafted(self, walks: Sequence[_Walk]) -> list[list[int | None]]:
        """Return the drafter's greedy token, as the target's id, at every new place of each text; None where it drafts none.

        A drafter that reads the token before the root cannot draft after a prompt of one token.
        """
        if not walks:
            return []
        target, drafter = self.frozen.target, self.frozen.drafter
        texts = [[*walk.prompt, *walk.new] for walk in walks]
        records = [Record(walk.id, text, [True] * len(text)) for walk, text in zip(walks, texts, strict=True)]
        batch, places = pack(records, width=max(map(len, texts)), weight_of_step=1.0)
        batch = batch.to(target.device)
        if drafter.needs() != TargetNeeds():
            batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))
        drafted = drafter(batch)
        vocabulary = DraftVocabulary(drafted.vocabulary, num_tokens=target.num_tokens)
        found: list[list[int | None]] = []
        for walk, (row, column) in zip(walks, places, strict=True):
            first = len(walk.prompt) - 1 - drafted.lag
            drafting = [state for state in range(first, first + len(walk.new)) if state >= 0]
            states_ND = drafted.states_BTD[1][row, [column + state for state in drafting]]
            tokens = vocabulary.likeliest(drafted.head(states_ND, 1)).tolist()
            found.append([None] * (len(walk.new) - len(tokens)) + tokens)
        return found


def _first_label(record: Record) -> int:
    """Return where the answer begins; the first token of a record is always part of the prompt."""
    return list(record.loss_mask).index(True, 1)
