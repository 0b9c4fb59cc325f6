"""Documents of one row do not see each other, whatever the architecture."""

import pytest
import torch
import transformers

from drafttrain.target.documents import document_states, tells_documents_apart

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": (transformers.LlamaConfig(**SIZES, intermediate_size=64), True),
    "gpt2": (transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2), True),
    "opt": (transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=1), False),
    "bloom": (transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), False),
    "falcon": (transformers.FalconConfig(**SIZES, alibi=True), False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_have_the_states_that_they_have_alone(name, dtype):
    config, apart = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert tells_documents_apart(model) == apart
    documents = [torch.randint(2, 64, (size,)) for size in (5, 3, 4, 6)]
    tokens_BT = torch.stack([torch.cat(documents[:2]), torch.cat([documents[2], documents[3][:4]])])
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        final_BTD, hidden = document_states(model, tokens_BT, positions_BT, hidden=(1,))
        places = [(0, 0, documents[0]), (0, 5, documents[1]), (1, 0, documents[2]), (1, 4, documents[3][:4])]
        for row, column, alone in places:
            wanted_1TD, tapped = document_states(model, alone[None], torch.arange(len(alone))[None], hidden=(1,))
            span = slice(column, column + len(alone))
            close = {"rtol": 0, "atol": 1e-5 if dtype is torch.float32 else 0.1}
            torch.testing.assert_close(final_BTD[row, span], wanted_1TD[0], **close)
            torch.testing.assert_close(hidden[1][row, span], tapped[1][0], **close)
