"""The parts of the target that a drafter uses without training them: embedding, head, final norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.batches import Head
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters.few_rows import Product, head_product
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import final_norm
from drafttrain.target_model.logits import finisher, head_logits, head_of
from drafttrain.target_model.matrix_products import head_parameters


class TargetParts:
    """The target's embedding and head. Not a module, so neither is trained or saved with the drafter."""

    def __init__(self, target: Target) -> None:
        self._target, self._model = target, target.model
        self._embedding: Any = target.model.get_input_embeddings()

    def embed(self, tokens_BT: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return embedded_BTD as the target reads it: Gemma, for one, multiplies the rows of its matrix."""
        with torch.no_grad():
            embedded_BTD: Tensor = self._embedding(tokens_BT.to(self._embedding.weight.device))
        return embedded_BTD.to(tokens_BT.device, dtype)

    def embedding_rows(self, tokens_BT: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return the rows of the target's embedding matrix as they are, rows_BTD."""
        weight_VD: Tensor = self._embedding.weight.detach()
        return weight_VD[tokens_BT.to(weight_VD.device)].to(tokens_BT.device, dtype)

    def head(self, states_ND: Tensor) -> Tensor:
        """Return logits_NV, differentiable in the states."""
        return head_logits(self._model, states_ND.to(self._model.get_output_embeddings().weight.dtype))

    @property
    def num_tokens(self) -> int:
        """Ids that the target's tokenizer can produce; the head may have more rows."""
        return self._target.num_tokens

    @property
    def linear_head(self) -> Head:
        """The head as losses use it: in parts if it is a plain matrix."""
        return head_of(self._model)

    def linear_head_after(self, norm: nn.Module) -> Head:
        """Return the head of states that pass through a trained norm first."""
        return head_of(self._model, before=norm)

    def decoding_head(self) -> Product:
        """Return `head`, with its weights prepared for few rows."""
        product, dtype = head_product(self._model), self._model.get_output_embeddings().weight.dtype
        return lambda states_ND: product(states_ND.to(dtype))

    @property
    def finish(self) -> Callable[[Tensor], Tensor] | None:
        """The elementwise scale or soft cap of the head's logits; None: there is none."""
        return finisher(self._model.config.get_text_config())

    def head_rows(self, ids_R: Tensor) -> Tensor:
        """Return the head's rows for these token ids."""
        weight_VD = self._model.get_output_embeddings().weight.detach()
        rows_RD: Tensor = weight_VD[ids_R.to(weight_VD.device)]
        return rows_RD

    def final_gain(self) -> Tensor:
        """Return gain_D, the factor that the final norm applies to a normed state; ones if it has no weight."""
        norm: Any = final_norm(self._model)
        embedding = self._embedding.weight
        # Measured on a state of constant magnitude and on its negative, so that neither a bias nor the name of the weight
        # matters. The magnitude is large, so that epsilon does not matter.
        sign_D = (1 - 2 * (torch.arange(embedding.shape[1], device=embedding.device) % 2)).to(embedding.dtype)
        with torch.no_grad():
            up_D, down_D = norm(torch.stack([1024 * sign_D, -1024 * sign_D])[None])[0]
        gain_D: Tensor = (up_D - down_D) / (2 * sign_D)
        return gain_D

    @property
    def embedding_row_bytes(self) -> int:
        """Bytes of one embedding row."""
        weight = self._embedding.weight
        return int(weight.shape[1] * weight.element_size())

    @property
    def head_parameters(self) -> int:
        """Parameters of the head."""
        return head_parameters(self._model)

    @property
    def head_weights(self) -> Weights:
        """The weights of the head."""
        return weights_of(self._model.get_output_embeddings())
