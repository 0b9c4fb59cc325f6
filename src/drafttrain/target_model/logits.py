"""Computes logits from the final state as the model itself does, and checks that once per model.

B = sequences, T = positions, V = vocabulary, D = hidden, N = rows, P = rows with padding
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from drafttrain.core.batches import Head
from drafttrain.core.eight_bit import as_states
from drafttrain.core.errors import CheckpointError
from drafttrain.core.few_sizes import in_few_sizes
from drafttrain.core.linear_head import LinearHead, no_autocast_if_frozen
from drafttrain.core.target_rows import PartOfRows
from drafttrain.target_model.anatomy import stack_holder, trunk
from drafttrain.target_model.block_range import replaced_forwards

DIVIDED_BY = ("logits_scaling", "logits_mup_width_multiplier")
"""Granite, MiniCPM3; Inkling."""
MULTIPLIED_BY = ("logit_scale", "lm_head_multiplier")
"""Cohere; Falcon-H1."""
CAPPED_AT = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma 2 to 4, NanoChat; RecurrentGemma; xLSTM."""
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
"""Models that multiply by Granite's field instead of dividing."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest differences, relative to the largest logit, that rounding explains."""

_compared: WeakSet[nn.Module] = WeakSet()


def head_logits(model: Any, states_ND: Tensor) -> Tensor:
    """Return the logits of states after the final norm, including the scale or soft cap of the architecture.

    They are on the device of the states, even if the model is on another one.
    """
    head = model.get_output_embeddings()
    with no_autocast_if_frozen(head.weight):
        logits_NV = head(states_ND.to(head.weight.device)).to(states_ND.device)
        return finished_logits(model.config.get_text_config(), logits_NV)


def head_logits_of(model: Any, states_ND: Tensor, ids_R: Tensor) -> Tensor:
    """Return logits_NR, the columns `ids_R` of `head_logits`; a plain output matrix multiplies only these rows."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or hasattr(head.weight, "ds_id"):
        return head_logits(model, states_ND)[:, ids_R]
    device = head.weight.device
    own_R = ids_R.to(device)
    bias_R = None if head.bias is None else head.bias[own_R]
    with no_autocast_if_frozen(head.weight):
        logits_NR = linear(states_ND.to(device), head.weight[own_R], bias_R).to(states_ND.device)
        return finished_logits(model.config.get_text_config(), logits_NR)


class LiveRows:
    """The target's distribution from its final states. The head runs only on the requested rows."""

    def __init__(self, model: Any, final_BTD: Tensor) -> None:
        self._model = model
        self._final_BTD = final_BTD

    def each(self, change: Callable[[Tensor], Tensor]) -> LiveRows:
        """Return a copy with changed tensors: moved, pinned."""
        return LiveRows(self._model, change(self._final_BTD))

    @torch.no_grad()
    def at(self, index_N: Tensor) -> Tensor:
        """Return logits_NV of the token after each flat position."""
        return head_logits(self._model, self._states(index_N))[: len(index_N)].to(index_N.device)

    def _states(self, index_N: Tensor) -> Tensor:
        """Return states_PD, with rows of padding."""
        # Cached states may have another type than the head.
        return in_few_sizes(as_states(_rows_at(self._final_BTD, index_N)).to(self._model.dtype))


class SummedRows(LiveRows):
    """Final states with what the head says about all tokens: the logits of some tokens can be computed alone.

    Args:
        likeliest_BT: The likeliest token after each position.
        log_total_BT: Logarithm of the sum of exp(logit) over the ids below `num_tokens`.
    """

    def __init__(
        self, model: Any, final_BTD: Tensor, *, likeliest_BT: Tensor, log_total_BT: Tensor, num_tokens: int
    ) -> None:
        super().__init__(model, final_BTD)
        self._likeliest_BT = likeliest_BT
        self._log_total_BT = log_total_BT
        self.num_tokens = num_tokens

    def each(self, change: Callable[[Tensor], Tensor]) -> SummedRows:
        """Return a copy with changed tensors: moved, pinned."""
        return SummedRows(
            self._model,
            change(self._final_BTD),
            likeliest_BT=change(self._likeliest_BT),
            log_total_BT=change(self._log_total_BT),
            num_tokens=self.num_tokens,
        )

    @torch.no_grad()
    def of_tokens(self, index_N: Tensor, ids_R: Tensor) -> PartOfRows:
        """Return the logits of some tokens after each flat position."""
        return PartOfRows(
            logits_NR=head_logits_of(self._model, self._states(index_N), ids_R)[: len(index_N)].to(index_N.device),
            likeliest_N=_rows_at(self._likeliest_BT, index_N).to(index_N),
            log_total_N=_rows_at(self._log_total_BT, index_N).to(index_N.device),
        )


def _rows_at(values_BT: Tensor, index_N: Tensor) -> Tensor:
    return values_BT.flatten(0, 1).index_select(0, index_N.to(values_BT.device))


def head_of(model: Any, *, before: nn.Module | None = None) -> Head:
    """Return the model's head for the losses: in parts if it is a plain matrix, else (quantized, adapted) as a function.

    Args:
        before: A layer that the states pass through first.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        entering = before or nn.Identity()
        return lambda states_ND, depth: head_logits(model, entering(states_ND).to(model.dtype))
    return LinearHead(lambda depth: head, before=before, after=finisher(model.config.get_text_config()))


def some_rows(head: Head, ids_R: Tensor) -> Head:
    """Return the head of some tokens, whose gradient reaches the whole head. A plain matrix multiplies only these rows."""
    if not isinstance(head, LinearHead) or head.added is not None or hasattr(head.linear(1).weight, "ds_id"):
        return lambda states_ND, depth: head(states_ND, depth)[:, ids_R]
    chosen: dict[int, Any] = {}

    def rows(depth: int) -> Any:
        if depth not in chosen:
            whole = head.linear(depth)
            chosen[depth] = _Rows(whole.weight[ids_R], None if whole.bias is None else whole.bias[ids_R])
        return chosen[depth]

    return LinearHead(rows, before=head.before, after=head.after)


class _Rows:
    """An output matrix that is computed from another, as `LinearHead` uses it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, states_ND: Tensor) -> Tensor:
        return linear(states_ND, self.weight, self.bias)


def rows_of_head(model: Any, ids_R: Tensor) -> nn.Linear:
    """Return a frozen copy of the output matrix's rows for these tokens.

    Raises:
        CheckpointError: The head is no plain matrix.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise CheckpointError(
            f"drafter.draft_vocab_size: this target's head is a {type(head).__name__}, not a plain matrix whose rows can be "
            "used: leave it null"
        )
    ids_R = ids_R.to(head.weight.device)
    rows = nn.Linear(head.in_features, len(ids_R), bias=head.bias is not None, device="meta")
    for name, weight in list(head.named_parameters()):
        setattr(rows, name, nn.Parameter(weight.detach()[ids_R], requires_grad=False))
    return rows


def finisher(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the scale or soft cap of the architecture as a function; None: it has none."""
    names = (*DIVIDED_BY, *MULTIPLIED_BY, *CAPPED_AT)
    return partial(finished_logits, config) if any(getattr(config, name, None) for name in names) else None


def finished_logits(config: Any, logits: Tensor) -> Tensor:
    """Return logits with the scale or soft cap of the architecture, from the output matrix's products."""
    divides = DIVIDED_BY if config.model_type not in MULTIPLIES_BY_LOGITS_SCALING else ()
    for name in (*DIVIDED_BY, *MULTIPLIED_BY):
        if scale := getattr(config, name, None):
            logits = logits / scale if name in divides else logits * scale
    for name in CAPPED_AT:
        if cap := getattr(config, name, None):
            logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Compare logits computed from the final state with the model's own, on a short text, once per model.

    Decoding uses the model's own logits; training, caches, replay and alpha compute them from the final state. For a model
    whose blocks have no weights, random states take the place of the text's.

    Raises:
        CheckpointError: They differ by more than rounding explains.
    """
    if model in _compared:
        return
    embedding = model.get_input_embeddings().weight
    device = embedding.device
    # Under ZeRO-3 the embedding has no rows outside a forward.
    tokens_BT = torch.arange(1, 9, device=device)[None] % int(model.config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, enabled=False):
        if any(parameter.is_meta for parameter in model.parameters()):
            generator = torch.Generator().manual_seed(0)
            width = int(model.get_output_embeddings().weight.shape[1])
            states_BTD = torch.randn(1, 8, width, generator=generator).to(device, embedding.dtype)
            with _final_states(model, states_BTD):
                own_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        else:
            states_BTD = trunk(model)(input_ids=tokens_BT, use_cache=False).last_hidden_state
            own_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        difference = _difference(model, states_BTD, own_BTV)
    model.train(was_training)
    if difference > TOLERANCE.get(model.dtype, max(TOLERANCE.values())):
        known = ", ".join((*DIVIDED_BY, *MULTIPLIED_BY, *CAPPED_AT))
        raise CheckpointError(
            f"{model.config.name_or_path or 'model'}: {type(model).__name__} computes its logits in an unknown way: they "
            f"differ by {difference:.1%} of the largest one from its output matrix applied to its final state with {known}. "
            "Training and alpha would use another distribution than decoding, so this model can be decoded, but not trained "
            "for or replayed"
        )
    _compared.add(model)


def assume_compared(model: Any) -> None:
    """Let `check_logits` pass for a model whose weights have no data."""
    _compared.add(model)


def _difference(model: Any, states_BTD: Tensor, own_BTV: Tensor) -> float:
    """Return the largest difference from the model's own logits, relative to the largest logit."""
    try:
        ours_BTV = head_logits(model, states_BTD)
    except RuntimeError:
        # The output matrix has another width: the model has a layer between it and the final state.
        return float("inf")
    # Some models remove the padding from their own logits.
    distance_BTV = (own_BTV - ours_BTV[..., : own_BTV.shape[-1]]).abs()
    return float(distance_BTV.max() / own_BTV.abs().max())


@contextlib.contextmanager
def _final_states(model: Any, states_BTD: Tensor) -> Iterator[None]:
    """Replace the model's final states within the context, whatever tokens it reads."""
    given = _TrunkOutput([states_BTD])
    with replaced_forwards({module: lambda *_, **__: given for module in (trunk(model), stack_holder(model))}):
        yield


class _TrunkOutput(tuple[Tensor, ...]):
    """An output with only the final state: all other attributes are None."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None
