"""Medusa: heads on the target's final state; each one predicts one token further ahead.

B = sequences, T = positions, V = the target's vocabulary, R = the heads' vocabulary, D = hidden, K = heads, N = rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowsAsked, TargetNeeds
from drafttrain.core.tensors import load_into
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.draft_vocabulary import most_frequent, size_for, token_map_problems
from drafttrain.drafters.medusa.blocks import ResidualBlocks, uninitialized_linear
from drafttrain.drafters.medusa.calibration import calibrated_tree
from drafttrain.drafters.medusa.decoding import DecodingHeads
from drafttrain.drafters.medusa.folder import TREE, read_config, read_tree
from drafttrain.drafters.medusa.proposer import MedusaProposer
from drafttrain.drafters.medusa.settings import JointSettings, MedusaSettings
from drafttrain.drafters.medusa.static_tree import Path as TreePath
from drafttrain.drafters.tuned_target import TunedTarget, tuning_in
from drafttrain.drafters.warm_start import checkpoint_folder
from drafttrain.target_model import Target
from drafttrain.target_model.logits import finished_logits, finisher
from drafttrain.target_model.matrix_products import head_parameters


@drafters.register("medusa", MedusaSettings)
class Medusa(Drafter):
    """K heads, each with residual blocks and an output matrix. Lag 1; depth d is the number of the head.

    Blocks start as the identity (weight and bias zero) and output matrices as copies of the target's head, or of its rows of
    the draft vocabulary. So every head starts equal to the target's. No head shares its blocks with another.

    Source: Cai et al. 2024, Medusa, arXiv 2401.10774, 2.1.
    """

    kind = "medusa"
    compiles = True
    lag = 1
    needs_target = True
    serving: ClassVar[str] = (
        "vLLM drafts chains of each head's best guess; only the embedded evaluator reads the tree next to the weights.\n"
        "If there is a folder adapter/, TARGET is the target with that adapter."
    )

    def __init__(
        self,
        *,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        target_config: Any,
        draft_vocab_size: int | None = None,
        shared_head: bool = False,
        draft: str = "sampled",
        paths: list[TreePath] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlocks(hidden_size, num_layers, device=device) for _ in range(num_heads))
        num_rows = draft_vocab_size or vocab_size
        # The caller writes these matrices. Drawing them first, on the CPU, takes minutes for a large vocabulary.
        self.lm_heads = nn.ModuleList(
            uninitialized_linear(hidden_size, num_rows, bias=False, device=device)
            for _ in range(1 if shared_head else num_heads)
        )
        self.token_map: Tensor | None
        """ids_R, the target's id of each token of the heads; None: the vocabularies are the same."""
        self.register_buffer("token_map", None if num_rows == vocab_size else torch.arange(num_rows, device=device))
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.shared_head = shared_head
        self.decay = 1.0
        self.draft = draft
        self.joint: JointSettings | None = None
        self.adapter: Any = None
        """The adapters in training: the weights of `tuned`."""
        self.paths = paths
        """The calibrated tree, best nodes first; None: only chains can be drafted."""
        self._target_config = target_config
        self._target: Target | None = None
        self._keeps_vocabulary = False

    @classmethod
    def tuned_by(cls, settings: MedusaSettings) -> str | None:
        """Return the key of the adapters."""
        return None if settings.joint is None else "joint"

    @classmethod
    def create(cls, settings: MedusaSettings, *, target: Target | None, tokenizer: Any) -> Medusa:
        """Return heads that all start equal to the target's own head."""
        if target is None:
            raise CheckpointError("drafter.kind is 'medusa' but target.model is null: the heads need a target")
        head = target.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise CheckpointError(
                f"{target.name}: its output head has a bias, which Medusa's layout cannot store: use another drafter.kind"
            )
        if settings.checkpoint is None:
            made = cls._like_head(head.weight, settings, target)
            made._target = target
        else:
            made = cls.load(checkpoint_folder(settings.checkpoint, target, kind=cls.kind), target, "float32").train()
            if made.tuning is not None:
                raise CheckpointError(
                    f"drafter.checkpoint: {made.tuning}: training cannot continue from heads on an adapted target "
                    "(Medusa-2)"
                )
            made.draft, made.paths = settings.draft, None
            made._keeps_vocabulary = True
        made.train_with(settings, target=target, tokenizer=tokenizer)
        if settings.joint is not None:
            made.joint = settings.joint
            made.tuned = TunedTarget(target, settings.joint.lora, key="drafter.joint.lora")
            made.adapter = made.tuned.weights
        return made

    def train_with(self, settings: MedusaSettings, *, target: Target | None, tokenizer: Any) -> None:
        """Weigh the losses of the heads as the settings say."""
        self.decay = settings.decay

    @classmethod
    def _like_head(cls, weight_VD: Tensor, settings: MedusaSettings, target: Target) -> Medusa:
        """Return heads whose output matrices are copies of this weight, or of its first rows."""
        vocab_size, hidden_size = weight_VD.shape
        made = cls(
            num_heads=settings.num_heads,
            num_layers=settings.num_layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            target_config=target.model.config.get_text_config(),
            draft_vocab_size=size_for(target, settings.draft_vocab_size),
            shared_head=settings.shared_head,
            draft=settings.draft,
            device=weight_VD.device,
        )
        made._start_heads(weight_VD)
        return made

    @torch.no_grad()
    def _start_heads(self, weight_VD: Tensor) -> None:
        """Copy the target's head, or its rows of this vocabulary, to every output matrix."""
        rows_RD = weight_VD if self.token_map is None else weight_VD[self.token_map.to(weight_VD.device)]
        for parameter in self.lm_heads.parameters():
            parameter.copy_(rows_RD)

    def fit_vocabulary(self, label_counts: Callable[[], Any]) -> None:
        """Choose the most frequent labels, ties by lower id. Heads loaded from a checkpoint keep their vocabulary."""
        if self.token_map is None or self._keeps_vocabulary:
            return
        assert self._target is not None, "create sets it"
        self.token_map.copy_(most_frequent(label_counts(), size=len(self.token_map), vocab_size=self.vocab_size))
        self._start_heads(self._target.model.get_output_embeddings().weight)

    @property
    def deepest(self) -> int:
        """One draft token per head."""
        return self.num_heads

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token in the heads' vocabulary; None: the vocabularies are the same."""
        return self.token_map

    def needs(self) -> TargetNeeds:
        """Return what the heads read: the state after the final norm."""
        return TargetNeeds(final=True)

    def rows_asked(self) -> list[RowsAsked]:
        """Return the rows of every head, and in joint training also those of the target itself."""
        of_target = [] if self.joint is None else [RowsAsked((1,), 0)]
        return [RowsAsked(tuple(range(1, self.num_heads + 1)), self.lag), *of_target]

    @property
    def compares_with_target(self) -> bool:
        """True in joint training, whatever the loss of the heads."""
        return self.joint is not None

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return, for every head, the states that its output matrix reads."""
        final_BTD = batch.target.final_BTD if batch.target is not None else None
        assert final_BTD is not None, "the module reads the target first"
        factor = 1.0
        beside: tuple[Any, ...] = ()
        if self.tuned is not None and not self.tuned.weights.on:
            final_BTD, _ = self.tuned.read(batch)
        if self.joint is not None and self.training:
            assert self.tuned is not None, "create sets both"
            factor = self.joint.coefficient(batch.step)
            beside = (self.tuned.divergence(final_BTD, batch),)
        weights = {depth: factor * self.decay**depth for depth in range(1, self.num_heads + 1)}
        return replace(self._drafted(final_BTD), depth_weights=weights, beside=beside)

    def _drafted(self, final_BTD: Tensor) -> DraftOutput:
        states_BTD = {depth: self.states(final_BTD, depth) for depth in range(1, self.num_heads + 1)}
        return DraftOutput(states_BTD, self._head, self.lag, vocabulary=self.vocabulary)

    @property
    def _head(self) -> LinearHead:
        return LinearHead(self._output_matrix, after=finisher(self._target_config))

    def _output_matrix(self, depth: int) -> nn.Module:
        return self.lm_heads[0 if self.shared_head else depth - 1]

    def states(self, final_ND: Tensor, depth: int) -> Tensor:
        """Return the output of a head's residual blocks on the target's states."""
        states: Tensor = self.blocks[depth - 1](final_ND.to(next(self.parameters()).dtype))
        return states

    def head(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NR of a head, with the scale or soft cap of the target."""
        return finished_logits(self._target_config, self._output_matrix(depth)(states_ND))

    def decoding_heads(self) -> DecodingHeads:
        """Return `states` and `head` of all heads as decoding calls them, with their weights prepared once."""
        blocks = cast("list[ResidualBlocks]", list(self.blocks))
        return DecodingHeads(blocks, list(self.lm_heads), after=finisher(self._target_config))

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile the residual blocks of each head."""
        for head in self.blocks:
            head.__dict__["forward"] = compiled(head.forward)

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of every head; for Medusa-2 also those of the target with adapters, and of its own head."""
        joint = self.tuned is not None
        for depth in range(1, self.num_heads + 1):
            for number in range(self.num_layers):
                # The input of the first block needs a gradient only if the target has adapters in training.
                yield matrix(self.hidden_size**2, shape.positions, gradients=2 if joint or number else 1)
            yield matrix(parameters_of(self._output_matrix(depth)), shape.rows(depth + self.lag), gradients=2)
        if self.tuned is not None:
            yield from self.tuned.products(shape)
            yield matrix(head_parameters(self.tuned.target.model), shape.rows(1), gradients=1)

    def lr_factor(self, name: str) -> float:
        """Return the factor on train.lr for a parameter."""
        return 1.0 if self.joint is None or name.startswith("adapter.") else self.joint.head_lr_multiplier

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer that drafts with these heads."""
        return MedusaProposer(self, num_tokens=target.num_tokens, listener=listener)

    @torch.no_grad()
    def calibrate(self, target: Target, batches: Iterable[DraftBatch]) -> Mapping[str, Any]:
        """Return the file of the tree, from how often each guess of each head is right on held-out text."""
        drafts = ((batch, self._drafted(_final(target, batch))) for batch in batches)
        vocabulary = DraftVocabulary(self.token_map, num_tokens=target.num_tokens)
        return {TREE: calibrated_tree(drafts, self.head, num_heads=self.num_heads, vocabulary=vocabulary)}

    def save(self, folder: Path) -> None:
        """Write the layout of vLLM's `method: medusa`."""
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "medusa_fc_bias": True,
            "drafttrain_draft": self.draft,
        }
        if self.token_map is not None:
            config["truncated_vocab_size"] = len(self.token_map)
        if self.shared_head:
            config["original_lm_head"] = True
        write_json(folder / "config.json", config)
        tensors = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in self.state_dict().items()
            if not name.startswith("adapter.")
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if self.tuned is not None:
            self.tuned.save(folder)

    @classmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Medusa:
        """Read a Medusa folder for a target of the same sizes.

        Args:
            dtype: Type of the weights; None: the target's.

        Raises:
            CheckpointError: Keys are missing, or the sizes are not the target's.
        """
        config = read_config(folder)
        made_for = (config["vocab_size"], config["hidden_size"])
        sizes = tuple(target.model.get_output_embeddings().weight.shape)
        if made_for != sizes:
            raise CheckpointError(
                f"{folder}: heads of (vocabulary, hidden size) {made_for}, this target, {target.name}, has {sizes}: "
                "use the target that they were made for"
            )
        made = cls(
            num_heads=config["num_heads"],
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            target_config=target.model.config.get_text_config(),
            draft_vocab_size=config.get("truncated_vocab_size"),
            shared_head=config.get("original_lm_head", False),
            draft=config.get("drafttrain_draft", "sampled"),
            paths=read_tree(folder),
            device=target.device,
        )
        made.tuning = tuning_in(folder)
        kind = dtype or target.model.dtype
        made.to(target.device, getattr(torch, kind) if isinstance(kind, str) else kind)
        load_into(made, folder / "model.safetensors")
        ids_R = made.token_map
        if ids_R is not None and (problems := token_map_problems(ids_R.cpu(), vocab_size=made.vocab_size)):
            raise CheckpointError(f"{folder / 'model.safetensors'}: {problems[0]}")
        return made.eval()


def _final(target: Target, batch: DraftBatch) -> Tensor:
    """Return the target's final_BTD of a batch."""
    final_BTD = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True)).final_BTD
    assert final_BTD is not None
    return final_BTD
