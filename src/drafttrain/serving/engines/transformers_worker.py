"""Decode prompts with Hugging Face's assisted generation and count. Runs without drafttrain; `in_engine.py` starts it.

The request:

    target, assistant    folders; assistant null: the target alone
    num_draft_tokens     draft tokens of a round
    dtype
    prompts              lists of token ids, decoded one by one: assisted generation takes no batch
    max_tokens           new tokens of each prompt
    warm_up              decode the first prompt once more before
    runs                 [{temperature, seed}], each over all prompts

The answer: `version`, and for every run its `prompts`, each with `tokens`, the counters of speculation, and its times; or `error`. `generate` has
no counters: drafts are the tokens that each forward of the target reads after the text, accepted tokens those that the streamer gets.
"""

import os
import time
from typing import Any

SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    os.environ.update(SETTINGS)
    import torch
    import transformers

    # With more threads small models are slower.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    target = _loaded(transformers, request["target"], request["dtype"])
    assistant = None
    if request["assistant"]:
        assistant = _loaded(transformers, request["assistant"], request["dtype"])
        assistant.generation_config.num_assistant_tokens = request["num_draft_tokens"]
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
    prompts = list(zip(request["prompts"], request["max_tokens"], strict=True))
    if request["warm_up"]:
        _run(torch, transformers, target, assistant, prompts[:1], temperature=0.0, seed=0)
    runs = [_run(torch, transformers, target, assistant, prompts, **run) for run in request["runs"]]
    return {"version": transformers.__version__, "runs": runs}


def _loaded(transformers: Any, folder: str, dtype: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # Else the folder's generation config sets what a call leaves open, such as an end of text or a temperature.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def _run(
    torch: Any,
    transformers: Any,
    target: Any,
    assistant: Any,
    prompts: list[tuple[list[int], int]],
    *,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    # The default top_k would sample from the 50 likeliest tokens only.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    decoded = []
    for number, (prompt, max_tokens) in enumerate(prompts):
        config = transformers.GenerationConfig(
            max_new_tokens=max_tokens, pad_token_id=0, **{"do_sample": False, **sampling}
        )
        torch.manual_seed(seed + number)
        rounds = Rounds(len(prompt))
        hook = target.register_forward_pre_hook(rounds.before_forward, with_kwargs=True)
        speculation = {} if assistant is None else {"assistant_model": assistant, "streamer": rounds}
        ids = torch.tensor([prompt])
        began, cpu = time.monotonic(), time.process_time()
        with torch.no_grad():
            output = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **speculation)
        ended, cpu = time.monotonic(), time.process_time() - cpu
        hook.remove()
        tokens = output[0, len(prompt) :].tolist()
        # The second forward begins when the first token is known.
        first = [*rounds.began, ended][1]
        times = {"seconds": ended - began, "prompt_seconds": first - began, "cpu_seconds": cpu}
        decoded.append({"tokens": tokens, **(rounds.counters(tokens) if assistant is not None else {}), **times})
    return {"temperature": temperature, "prompts": decoded}


class Rounds:
    """Counts the drafts that the target's forwards read and the tokens that it accepted; passed to `generate` as its streamer."""

    def __init__(self, prompt_length: int) -> None:
        self.drafted: list[int] = []
        self.accepted: list[list[int]] = []
        self.began: list[float] = []
        self._prompt_length = prompt_length
        self._begun = False

    def before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Record when a forward begins, and how many tokens it reads beyond the text: the prompt at first, later the last token."""
        self.began.append(time.monotonic())
        known = 1 if self.drafted else self._prompt_length
        self.drafted.append(int(kwargs["input_ids"].shape[1]) - known)

    def put(self, value: Any) -> None:
        """Record the tokens of a round; the first call is the prompt."""
        if self._begun:
            self.accepted.append(value.reshape(-1).tolist())
        self._begun = True

    def end(self) -> None:
        """Do nothing: `generate` returns the complete text."""

    def counters(self, tokens: list[int]) -> dict[str, Any]:
        """Return the counters of the rounds that drafted.

        Raises:
            RuntimeError: The recorded rounds do not add up to the text.
        """
        fits = [len(new) <= drafted + 1 for drafted, new in zip(self.drafted, self.accepted, strict=True)]
        if [token for new in self.accepted for token in new] != tokens or not all(fits):
            raise RuntimeError(
                f"the target's forwards read {self.drafted} draft tokens, the streamer got {self.accepted}"
            )
        rounds = [(d, len(new) - 1) for d, new in zip(self.drafted, self.accepted, strict=True) if d]
        return {
            "num_drafts": len(rounds),
            "num_draft_tokens": sum(drafted for drafted, _ in rounds),
            "num_accepted": sum(accepted for _, accepted in rounds),
            "accepted_at": [
                sum(accepted >= i for _, accepted in rounds) for i in range(1, max(self.drafted, default=0) + 1)
            ],
        }
