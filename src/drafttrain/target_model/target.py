"""The target: a frozen Hugging Face causal LM behind a small interface.

B = sequences, T = positions
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.errors import CheckpointError
from drafttrain.core.images import Image, PlacedImages
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput, TargetRows
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.device import pick_device
from drafttrain.target_model.documents import document_states, seen_states
from drafttrain.target_model.end_tokens import end_ids, report_end_tokens
from drafttrain.target_model.folders import fingerprint_of, resolve_folder
from drafttrain.target_model.image_reader import ImageReader
from drafttrain.target_model.loading import load_model
from drafttrain.target_model.logits import LiveRows, head_logits
from drafttrain.target_model.multimodal import language_model_inside
from drafttrain.target_model.number_type import number_type
from drafttrain.target_model.positions import position_limit
from drafttrain.target_model.seeing_lm import SeeingLM
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.tokenizer import load_target_tokenizer, num_ids, tokenizer_fingerprint
from drafttrain.target_model.vision import Vision
from drafttrain.target_model.weights_digest import weights_digest


class Target:
    """A frozen causal LM with its tokenizer and the fingerprints of both."""

    sharded: ClassVar[bool] = False
    """Its weights are sharded over the processes, which must all run it together."""
    elsewhere: ClassVar[bool] = False
    """Its blocks run in an engine: their operations are not those of the processes that train."""
    generates: ClassVar[bool] = True
    """transformers' `generate` with its model writes its distribution."""

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, fingerprint: str, vision: Vision | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self.vision = vision
        """Its parts that read images, around the same model; None: `target.images` is false."""

    @classmethod
    def load(cls, settings: TargetSettings) -> Target:
        """Load a target from its folder or hub id."""
        if settings.model is None:
            raise CheckpointError("target.model is null: this step needs a target")
        folder, device = resolve_folder(settings.model, revision=settings.revision), pick_device(settings.device)
        reader = ImageReader.load(settings)
        whole = load_model(
            folder,
            dtype=number_type(settings),
            attention=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
        model = language_model_inside(whole, folder)
        if reader is not None and model is whole:
            raise CheckpointError(f"{folder}: target.images needs a multimodal model, got {type(whole).__name__}")
        model.to(device)
        vision = None if reader is None else Vision(whole, reader).to(device)
        about: Any = {"name": settings.model, "fingerprint": fingerprint_of(folder), "vision": vision}
        return cls(model, load_target_tokenizer(settings), **about)

    @property
    def images(self) -> ImageReader | None:
        """The reader of images; None: `target.images` is false."""
        return None if self.vision is None else self.vision.reader

    @property
    def device(self) -> torch.device:
        """The device of the target."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def visual_id(self) -> int | None:
        """The token at image positions; None: `target.images` is false."""
        return None if self.images is None else self.images.visual_id

    def check_length(self, length: int, *, what: str) -> None:
        """Refuse texts that are longer than the target's position embeddings.

        Args:
            what: The setting to reduce, for the error.

        Raises:
            CheckpointError: They are too long.
        """
        limit = position_limit(self.model)
        if limit is not None and length > limit:
            raise CheckpointError(f"{what}: {length} tokens are more than the {limit} positions of {self.name}")

    @property
    def vocab_size(self) -> int:
        """Rows of the target's head, including padding."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def num_tokens(self) -> int:
        """Ids that the tokenizer can produce; ids from here to `vocab_size` are padding. Counting reads the whole vocabulary."""
        return min(self.vocab_size, num_ids(self.tokenizer))

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Digest of the tokenizer's map from tokens to ids."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those in the generation config, the configuration and the tokenizer, as in engines."""
        report_end_tokens(self.model, self.tokenizer, name=self.name)
        return end_ids(self.model, self.tokenizer)

    @torch.no_grad()
    def read(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        needs: TargetNeeds,
        *,
        documents: PackedDocuments | None = None,
        images: Sequence[PlacedImages] = (),
    ) -> TargetOutput:
        """Return the target's outputs on packed rows. Documents in a row do not attend to each other.

        Args:
            documents: Where the documents are, if known: see `document_states`.
            images: Of the documents that have some.
        """
        if images:
            return self._seen(tokens_BT.to(self.device), positions_BT.to(self.device), needs, images)
        if documents is not None and documents.bounds.device != self.device:
            documents = documents.each(lambda tensor: tensor.to(self.device))
        final_BTD, hidden_BTD = document_states(
            self.model,
            tokens_BT.to(self.device),
            positions_BT.to(self.device),
            hidden=needs.hidden,
            documents=documents,
        )
        return TargetOutput(
            logits_BTV=head_logits(self.model, final_BTD) if needs.logits else None,
            hidden_BTD=hidden_BTD,
            final_BTD=final_BTD if needs.final else None,
        )

    def _seen(
        self, tokens_BT: Tensor, positions_BT: Tensor, needs: TargetNeeds, images: Sequence[PlacedImages]
    ) -> TargetOutput:
        if self.vision is None:
            raise CheckpointError(
                f"{self.name}: records have images, and this target reads text only: see target.images"
            )
        final_BTD, hidden_BTD = seen_states(
            self.model, self.vision, tokens_BT, positions_BT, hidden=needs.hidden, images=images
        )
        return TargetOutput(
            logits_BTV=head_logits(self.model, final_BTD) if needs.logits else None,
            hidden_BTD=hidden_BTD,
            final_BTD=final_BTD if needs.final else None,
        )

    def read_ahead(self, tokens_BT: Tensor, positions_BT: Tensor, needs: TargetNeeds) -> None:
        """Begin to read a batch that `read` will be called with, where that runs beside this process. By default it does not."""

    def rows_of(self, seen: TargetOutput) -> TargetRows:
        """Return the target's distribution over a batch whose final states were read."""
        assert seen.final_BTD is not None, "read the batch with TargetNeeds(final=True)"
        return LiveRows(self.model, seen.final_BTD)

    def decoder(self, *, name: str = "target", listener: ForwardListener | None = None) -> CachedLM:
        """Return its model with an empty cache, as the evaluator decodes with it."""
        if self.vision is not None:
            return SeeingLM(self.model, self.vision, name=name, listener=listener)
        return CachedLM(self.model, name=name, listener=listener)

    def answer_rows(self, prompt: Sequence[int], answer: Sequence[int], *, images: Sequence[Image] = ()) -> TargetRows:
        """Return its distribution before each token of an answer: row i is that of `answer[i]`."""
        tokens_1T = torch.tensor([[*prompt, *answer]])
        placed = [PlacedImages(0, 0, images)] if images else []
        positions_1T = torch.arange(tokens_1T.shape[1])[None]
        seen = self.read(tokens_1T, positions_1T, TargetNeeds(final=True), images=placed)
        assert seen.final_BTD is not None, "asked for"
        return LiveRows(self.model, seen.final_BTD[:, len(prompt) - 1 : -1])

    def logits_after(
        self, prompt: Sequence[int], answer: Sequence[int], *, together: int, images: Sequence[Image] = ()
    ) -> Tensor:
        """Return logits_V after a text whose last `together` tokens are read in one call, float32 or wider."""
        text, lm = [*prompt, *answer], self.decoder()
        lm.begin([text[: len(text) - together]], images=[images])
        (seen,) = lm.forward([text[len(text) - together :]])
        assert seen.logits_BTV is not None
        logits_V = seen.logits_BTV[0, -1]
        return logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))

    @contextmanager
    def for_own_share(self) -> Iterator[Target]:
        """Yield a target that this process can run on its own share of the work, however much the others have.

        Every process of the run must enter the context, even one without a share.
        """
        yield self

    def release(self) -> None:
        """Release what only `for_own_share` needs, before training."""

    def weights_digest(self) -> str:
        """Return the digest of the weights in memory, to check that they stayed frozen."""
        return weights_digest(self.model)
