"""drafttrain data inspect, drafttrain data check: the records of a recipe as training reads them, and their faults."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path

from drafttrain.config.recipe import Recipe
from drafttrain.core.console import progress, say, table
from drafttrain.core.errors import DataError, GateError
from drafttrain.core.files import written_beside
from drafttrain.core.marked_page import MarkedPage
from drafttrain.core.marked_text import MarkedOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.chat import Chat
from drafttrain.data_gen.data_check import KINDS, NOTES, Checker, Finding
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.openai_client import Completions, key_from
from drafttrain.data_gen.served_ids import served_differences
from drafttrain.data_gen.token_text import token_texts
from drafttrain.data_gen.training_data import source_of
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.serving.live_server import PATIENCE
from drafttrain.target_model.image_reader import ImageReader
from drafttrain.target_model.tokenizer import load_target_tokenizer

SERVED_CHATS = 64
"""Chats of each source that are compared with a server."""


def inspect_data(recipe: Recipe, folder: Path, *, number: int, skip: int, html: Path | None) -> None:
    """Show records of every source with their labels marked, and items that are quarantined with their reasons.

    Args:
        folder: The run folder; texts that the run generated are in it.
        number: Items shown of each source, after the first `skip`.
        html: Write a page instead of the terminal's text.
    """
    shown: MarkedPage | MarkedOutput = MarkedPage(f"Data of {recipe.name}") if html else MarkedOutput()
    if isinstance(shown, MarkedOutput):
        say(f"trained tokens are {shown.marks.legend}")
    for name, checker, most in _checkers(recipe, folder):
        for item in islice(checker.items(max_items=most), skip, skip + number):
            notes = "; ".join(f"{finding.kind}: {finding.what}" for finding in item.findings)
            for record in item.records:
                line = f"{name}  {item.where}  {len(record.tokens)} tokens, {sum(record.loss_mask[1:])} trained"
                _show(record, f"{line}  {notes}".rstrip(), checker.encoder, shown)
            if item.reason:
                say(f"{name}  {item.where}: {notes}")
    if isinstance(shown, MarkedPage) and html:
        shown.save(html)
        say(f"written: {html}")


def check_data(
    recipe: Recipe,
    folder: Path,
    *,
    server: str | None,
    model: str | None,
    api_key_variable: str | None,
    out: Path | None,
) -> None:
    """Check every item of every source, print what was found by kind, and stop with an error if there are faults.

    Args:
        folder: The run folder; texts that the run generated are in it.
        server: Address of a vLLM server of the target, whose tokenization is compared; None: none is.
        out: Write every finding here, one JSON object a line.

    Raises:
        GateError: Some items have faults; what only other programs would do differently is none.
    """
    found, num_items = list[Finding](), 0
    for name, checker, most in _checkers(recipe, folder):
        chats = list[tuple[str, Chat]]()
        with progress(f"checking {name}", total=None, unit="items") as bar:
            for item in checker.items(max_items=most):
                found += item.findings
                chats += [(item.where, item.chat)] if item.chat and len(chats) < SERVED_CHATS else []
                bar.advance(1)
            num_items += bar.done
        if server:
            key = key_from(api_key_variable, named_by="--api-key-variable")
            found += asyncio.run(_served(server, key, model, chats, checker.encoder))
            say(f"{name}: {len(chats):,} chats compared with {server}")
    if out:
        with written_beside(out) as temporary:
            temporary.write_text("".join(json.dumps(asdict(one)) + "\n" for one in found), encoding="utf-8")
        say(f"written: {out}")
    if not found:
        say(f"{num_items:,} items: nothing found")
        return
    counts = Counter(one.kind for one in found)
    first = {one.kind: one for one in reversed(found)}
    rows = [
        [kind, counts[kind], f"{first[kind].where}: {first[kind].what}", KINDS[kind]]
        for kind in KINDS
        if kind in counts
    ]
    table(rows, columns=["found", "items", "first", "what to do"])
    if faulty := {one.where for one in found if one.kind not in NOTES}:
        raise GateError(f"{recipe.name}: {len(faulty):,} of {num_items:,} items have faults")
    say(f"{num_items:,} items: no faults")


def _checkers(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Checker, int | None]]:
    """Yield the name, the checker, and the most items of each source."""
    quiet_libraries()
    tokenizer, images = load_target_tokenizer(recipe.target), ImageReader.load(recipe.target)
    encoder = Encoder(tokenizer, recipe.data.max_length, images=images)
    places = dict[bytes, str]()
    for number, chosen in enumerate(recipe.data.sources):
        source = source_of(chosen, RunFolder(folder).data)
        yield f"source {number} ({chosen.kind})", Checker(source, encoder.reading_as(chosen), places), chosen.max_items


def _show(record: Record, line: str, encoder: Encoder, shown: MarkedPage | MarkedOutput) -> None:
    # The first token has nothing before it and is not trained.
    mask = [False, *record.loss_mask[1:]]
    pieces = token_texts(encoder.tokenizer, record.tokens, mask)
    if isinstance(shown, MarkedPage):
        shown.head(line)
        for text, first, tokens in pieces:
            shown.write(text, marked=mask[first], about=f"token {first}: {', '.join(map(str, tokens))}")
        return
    shown.write(f"{line}\n")
    for is_label, run in groupby(pieces, key=lambda piece: mask[piece[1]]):
        shown.write("".join(text for text, _, _ in run), marked=is_label)
    shown.write("\n\n")


async def _served(
    url: str, key: str | None, model: str | None, chats: Sequence[tuple[str, Chat]], encoder: Encoder
) -> list[Finding]:
    async with Completions(url.rstrip("/").removesuffix("/v1") + "/v1", key, PATIENCE) as server:
        return await served_differences(chats, encoder, server, model=model or await _only_model(server))


async def _only_model(server: Completions) -> str:
    names = [str(card.get("id")) for card in await server.models() if not card.get("parent")]
    if len(names) != 1:
        raise DataError(f"{server.base_url}: serves {', '.join(names) or 'no model'}: give one with --model NAME")
    return names[0]
