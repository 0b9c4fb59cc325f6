"""Documents of one row do not attend to each other, for every architecture."""

import pytest
import torch
import transformers

from drafttrain.core.batches import PackedDocuments
from drafttrain.target_model import documents
from drafttrain.target_model.documents import document_states, separates_documents, takes_mask

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": (transformers.LlamaConfig(**SIZES, intermediate_size=64), True),
    "gpt2": (transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2), True),
    "opt": (transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=1), False),
    "bloom": (transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), False),
    "falcon": (transformers.FalconConfig(**SIZES, alibi=True), False),
    # Windows and chunks that are shorter than a document.
    "mistral": (
        transformers.MistralConfig(**SIZES, intermediate_size=64, num_key_value_heads=1, sliding_window=2),
        True,
    ),
    "gemma2": (
        transformers.Gemma2Config(
            **SIZES, intermediate_size=64, num_key_value_heads=1, head_dim=16, sliding_window=2, pad_token_id=1
        ),
        True,
    ),
    "gpt_neo": (
        transformers.GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=2,
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True])
def test_packed_documents_have_the_states_of_single_ones(name, dtype, given):
    config, apart = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert separates_documents(model) == apart
    documents = [torch.randint(2, 64, (size,)) for size in (5, 3, 4, 6)]
    tokens_BT = torch.stack([torch.cat(documents[:2]), torch.cat([documents[2], documents[3][:4]])])
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]])
    known = PackedDocuments.of(positions_BT) if given else None
    with torch.no_grad():
        final_BTD, hidden = document_states(model, tokens_BT, positions_BT, hidden=(1,), documents=known)
        places = [(0, 0, documents[0]), (0, 5, documents[1]), (1, 0, documents[2]), (1, 4, documents[3][:4])]
        for row, column, alone in places:
            wanted_1TD, tapped = document_states(model, alone[None], torch.arange(len(alone))[None], hidden=(1,))
            span = slice(column, column + len(alone))
            close = {"rtol": 0, "atol": 1e-5 if dtype is torch.float32 else 0.1}
            torch.testing.assert_close(final_BTD[row, span], wanted_1TD[0], **close)
            torch.testing.assert_close(hidden[1][row, span], tapped[1][0], **close)


@pytest.mark.parametrize(("name", "takes"), [("llama", True), ("gpt2", True), ("mistral", False), ("gemma2", False)])
def test_a_model_with_full_attention_accepts_our_mask(name, takes, monkeypatch):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name][0]).eval()
    assert takes_mask(model) == takes
    tokens_BT, positions_BT = torch.randint(2, 64, (2, 8)), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], list(range(8))])
    documents = PackedDocuments.of(positions_BT)
    looked = []
    find = transformers.masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        transformers.masking_utils, "find_packed_sequence_indices", lambda *a: looked.append(1) or find(*a)
    )
    plain_BTD, _ = document_states(model, tokens_BT, positions_BT)
    assert looked
    looked.clear()
    found_BTD, _ = document_states(model, tokens_BT, positions_BT, documents=documents)
    assert bool(looked) != takes
    assert torch.equal(found_BTD, plain_BTD)
    # A row that is one document needs no mask at all.
    alone_BT = torch.arange(8).repeat(2, 1)
    one_BTD, _ = document_states(model, tokens_BT, alone_BT, documents=PackedDocuments.of(alone_BT))
    assert torch.equal(one_BTD, document_states(model, tokens_BT, alone_BT)[0])


@pytest.mark.parametrize(
    ("error", "masked_only", "raised"),
    [
        (TypeError("no such mask"), True, False),
        (RuntimeError("a peer is gone"), False, True),
        (torch.OutOfMemoryError("no memory"), True, True),
        (torch.distributed.DistBackendError("a peer is gone"), True, True),
    ],
)
def test_errors_with_another_cause_are_not_blamed_on_the_mask(error, masked_only, raised, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_config(MODELS["llama"][0]).eval()
    assert separates_documents(model)
    final = documents._final

    def failing(model, tokens_BT, positions_BT, mask_B1TT=None):
        if masked_only and mask_B1TT is None:
            return final(model, tokens_BT, positions_BT)
        raise error

    monkeypatch.setattr(documents, "_final", failing)
    if raised:
        with pytest.raises(type(error), match=str(error)):
            takes_mask(model)
    else:
        assert not takes_mask(model)
