"""MiMo, which transformers has no class for: a Qwen2 model, and next-token-prediction layers beside it in the same files.

Source: Xiaomi 2025, MiMo, arXiv 2505.07608, 2.2; vLLM 0.32.0 builds its MiMo classes on those of Qwen2 too.
"""

from __future__ import annotations

MIMO = "mimo"
"""`model_type` of such a folder."""


def register_mimo() -> None:
    """Let transformers load MiMo as the Qwen2 model that it is, without code from its folder. Further calls do nothing.

    The next-token-prediction layers are no part of that model; `drafter.kind: mtp` reads them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if MIMO in CONFIG_MAPPING:
        return

    class MiMoConfig(Qwen2Config):
        model_type = MIMO

    class MiMoForCausalLM(Qwen2ForCausalLM):
        config_class = MiMoConfig
        _keys_to_ignore_on_load_unexpected = [r"model\.mtp_layers\..*"]  # noqa: RUF012

    AutoConfig.register(MIMO, MiMoConfig)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM)
