"""What a stop-and-exit controller and its frontier are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from drafttrain.core.settings import setting


@dataclass
class StopExitSettings:
    """Layers, texts, training, and the thresholds that are measured."""

    layers: list[int] | None = setting(
        None,
        help="Numbers of blocks after which the controller decides, ascending; null: after each but the last.",
        ge=1,
    )
    texts: str = setting(
        "builtin:held_out",
        help="Code: a file of JSON lines with `text`, or builtin:held_out (the modules of Python's standard library that the embedded "
        "target was not trained on).",
    )
    fit_share: float = setting(
        0.6, help="The first texts, up to this share of all tokens, are fitted on; the others are measured.", gt=0, lt=1
    )
    num_windows: int = setting(600, help="Most pieces of these texts that are labelled.", ge=1)
    context_tokens: int = setting(96, help="Most tokens before the place that is completed.", ge=16)
    max_tokens: int = setting(24, help="Most tokens of a completion; longer rests of a line are left out.", ge=1)
    width: int = setting(0, help="Hidden width of the classifiers; 0: linear.", ge=0)
    steps: int = setting(600, help="Training steps of each classifier.", ge=1)
    lr: float = setting(1e-2, help="Learning rate of AdamW, which falls on a cosine.", gt=0)
    num_cases: int = setting(200, help="Lines that are completed.", ge=2)
    exit: list[float] = setting(
        [0.6, 0.8, 0.95, 2.0],
        help="Thresholds of the chance that the layer's token is the target's; 0: always, above 1: never.",
        ge=0,
    )
    stop: list[float] = setting(
        [0.8, 0.9, 0.97, 2.0],
        help="Thresholds of the chance that the completion would not be accepted; 0: always, above 1: never.",
        ge=0,
    )
    seed: int = setting(0, help="Of the cases, the training and the random baselines.", ge=0)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = [
            f"{name}: give each threshold once, at least one, got {values}"
            for name, values in (("exit", self.exit), ("stop", self.stop))
            if not values or len(set(values)) < len(values)
        ]
        if not problems and min(*self.exit, *self.stop) > 1:
            problems.append(
                "exit, stop: all thresholds are above 1, so nothing but the whole target is left to measure"
            )
        return problems
