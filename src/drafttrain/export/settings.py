"""Settings of the export and its gate."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from drafttrain.core.settings import setting
from drafttrain.environments.known import engine_names, unknown_engine
from drafttrain.export import exporters


@dataclass
class ExportSettings:
    """The formats to write, and the figures that the drafter must reach."""

    format: Literal["hf"] = setting(
        "hf", help="hf: a plain Hugging Face folder, which vLLM, SGLang and transformers read."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", help="Type of the exported weights; the evaluation reads these files."
    )
    step: int | None = setting(
        None, help="Export the weights of this step, which train.keep_best must have kept; null: the best step.", ge=0
    )
    require: dict[str, Any] = setting(
        {},
        help="The gate: the lowest block_efficiency, alpha, mbsu, speedup or gain_over_start that is accepted, at temperature 0 if it is "
        "evaluated; parity: true.",
    )

    to: list[str] = setting(
        [],
        help="Further formats, each written to a folder beside the drafter's: vllm, speculators, sglang, gguf, openvino (drafter.vllm, ...).",
    )
    verify: list[str] = setting(
        [],
        help="Serving engines that must decode the export exactly as the evaluator does: vllm, llama.cpp or openvino "
        "(install with: drafttrain engines install NAME), or transformers.",
    )
    verify_prompts: int = setting(8, help="Prompts of eval.prompts that an engine decodes.", ge=1)
    verify_tokens: int = setting(64, help="New tokens for each of these prompts.", ge=2)
    speed_pairs: int = setting(
        0,
        help="Measure the engine's tokens/s on these prompts, in this many pairs of processes, with the drafter and without; 0: not.",
        ge=0,
    )

    KEYS: ClassVar[tuple[str, ...]] = ("block_efficiency", "alpha", "mbsu", "speedup", "gain_over_start", "parity")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [f"to: {exporters.unknown(name)}" for name in self.to if name not in exporters.names()]
        problems += [f"verify: {unknown_engine(name)}" for name in self.verify if name not in engine_names()]
        for key, value in self.require.items():
            if key not in self.KEYS:
                problems.append(f"require.{key}: unknown figure. Available: {', '.join(self.KEYS)}")
            elif (key == "parity") != isinstance(value, bool) or not isinstance(value, bool | int | float):
                problems.append(
                    f"require.{key}: must be {'true or false' if key == 'parity' else 'a number'}, got {value!r}"
                )
        return problems

    def smoke(self) -> "ExportSettings":
        """Return a copy that requires parity only: twenty steps test the code path, not the figures."""
        return replace(
            self,
            step=None,
            require={k: v for k, v in self.require.items() if k == "parity"},
            verify_prompts=min(self.verify_prompts, 2),
            verify_tokens=min(self.verify_tokens, 16),
            speed_pairs=min(self.speed_pairs, 1),
        )
