"""Settings of the export and its gate."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from drafttrain.core.settings import setting


@dataclass
class ExportSettings:
    """What is written, and what it must reach."""

    format: Literal["hf"] = setting(
        "hf", help="hf: a plain Hugging Face folder, which vLLM, SGLang and transformers read."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", help="Type of the exported weights; the evaluation reads these files."
    )
    require: dict[str, Any] = setting(
        {}, help="The gate: lowest block_efficiency (greedy, at eval.num_draft_tokens), alpha, mbsu; parity: true."
    )

    KEYS: ClassVar[tuple[str, ...]] = ("block_efficiency", "alpha", "mbsu", "speedup", "gain_over_start", "parity")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        for key, value in self.require.items():
            if key not in self.KEYS:
                problems.append(f"require.{key}: unknown figure. Available: {', '.join(self.KEYS)}")
            elif (key == "parity") != isinstance(value, bool) or not isinstance(value, bool | int | float):
                problems.append(
                    f"require.{key}: must be {'true or false' if key == 'parity' else 'a number'}, got {value!r}"
                )
        return problems

    def smoke(self) -> "ExportSettings":
        """Return a copy without a floor: twenty steps prove the path, not the figure. Parity is kept."""
        return ExportSettings(self.format, self.dtype, {k: v for k, v in self.require.items() if k == "parity"})
