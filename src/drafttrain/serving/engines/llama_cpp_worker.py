"""Decode prompts in llama.cpp's own server and count. Runs without drafttrain; `in_engine.py` starts it.

The request:

    target, drafter     GGUF files; drafter null: the target alone
    num_draft_tokens    draft tokens of a round
    draft               greedy or probabilistic
    dtype               type of keys, values and weights; weights in another type are widened first
    context             number of tokens of prompt and output
    prompts             lists of token ids, decoded one by one so that counters belong to one prompt
    max_tokens          new tokens of each prompt
    warm_up             decode the first prompt once more before
    runs                [{temperature, seed}], each over all prompts
    texts               texts to tokenize, special tokens included

The answer: `version`; for every run its `prompts`, each with `tokens`, the counters of speculation, and its times; `tokenized`. Or `error`.
"""

import http.client
import json
import os
import time
from typing import Any

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
"""With more threads small models are slower, and sums may come out in another order."""

TIMEOUT_SECONDS = 3600
CACHE_TYPES = {"float32": "GGML_TYPE_F32", "float16": "GGML_TYPE_F16", "bfloat16": "GGML_TYPE_BF16"}
SPECULATION = "llamacpp:spec_decode_"
COUNTERS = {
    "num_drafts": "num_drafts_total",
    "num_draft_tokens": "num_draft_tokens_total",
    "num_accepted": "num_accepted_tokens_total",
}
AT_POSITION = 'num_accepted_tokens_per_pos_total{position="'


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    import xllamacpp

    server = xllamacpp.Server(_parameters(xllamacpp, request))
    address = server.listening_address.removeprefix("http://")
    prompts = list(zip(request["prompts"], request["max_tokens"], strict=True))
    if request["warm_up"]:
        _run(address, prompts[:1], temperature=0.0, seed=0)
    runs = [_run(address, prompts, **run) for run in request["runs"]]
    tokenized = [_tokenized(address, text) for text in request["texts"]]
    return {"version": xllamacpp.__version__, "runs": runs, "tokenized": tokenized}


def _parameters(xllamacpp: Any, request: dict[str, Any]) -> Any:
    cache_type = getattr(xllamacpp.ggml_type, CACHE_TYPES[request["dtype"]])
    given = xllamacpp.CommonParams()
    given.model.path = _in_type(request["target"], request["dtype"], "target.gguf")
    given.n_ctx, given.n_parallel = request["context"], 1
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = THREADS
    given.cache_type_k = given.cache_type_v = cache_type
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # Results must depend neither on earlier texts nor on the size of this machine.
    given.cache_prompt, given.cache_ram_mib, given.fit_params, given.warmup = False, 0, False, False
    given.endpoint_metrics, given.verbosity = True, 1
    if request["drafter"]:
        # Without a type of speculation the drafter is loaded and never used.
        given.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        draft = given.speculative.draft
        draft.mparams.path = _in_type(request["drafter"], request["dtype"], "drafter.gguf")
        draft.n_max, draft.n_min, draft.p_min = request["num_draft_tokens"], 0, 0.0
        draft.probabilistic = request["draft"] == "probabilistic"
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = THREADS
        draft.cache_type_k = draft.cache_type_v = cache_type
    return given


def _in_type(path: str, dtype: str, wider: str) -> str:
    """Return a file with the same weights, in float32 if that is the type: llama.cpp computes in the type of the file."""
    import gguf
    import numpy

    reader = gguf.GGUFReader(path)
    if dtype != "float32" or all(tensor.tensor_type.name == "F32" for tensor in reader.tensors):
        return path
    writer = gguf.GGUFWriter(wider, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=([None, *field.types[1:]])[-1])
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, numpy.ascontiguousarray(values, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wider


def _run(address: str, prompts: list[tuple[list[int], int]], *, temperature: float, seed: int) -> dict[str, Any]:
    decoded = []
    for number, (prompt, max_tokens) in enumerate(prompts):
        before, cpu = _counters(address), time.process_time()
        text = _asked(
            address,
            "/completion",
            {
                "prompt": prompt,
                "n_predict": max_tokens,
                "temperature": temperature,
                # The default is a dozen samplers that change the distribution.
                "samplers": ["temperature"],
                "seed": seed + number,
                "return_tokens": True,
                "cache_prompt": False,
            },
        )
        answer, cpu = json.loads(text), time.process_time() - cpu
        counted = _difference(before, _counters(address))
        decoded.append({"tokens": answer["tokens"], **counted, **_times(answer["timings"]), "cpu_seconds": cpu})
    return {"temperature": temperature, "prompts": decoded}


def _times(timings: dict[str, float]) -> dict[str, float]:
    """Return the times of a request as the server reports them."""
    prompt, written = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
    return {"seconds": prompt + written, "prompt_seconds": prompt}


def _tokenized(address: str, text: str) -> list[int]:
    answer = _asked(address, "/tokenize", {"content": text, "add_special": True, "parse_special": True})
    tokens: list[int] = json.loads(answer)["tokens"]
    return tokens


def _counters(address: str) -> dict[str, Any]:
    """Return the counters of speculation since the server started."""
    lines = (line.removeprefix(SPECULATION).rsplit(" ", 1) for line in _asked(address, "/metrics").splitlines())
    values = {line[0]: int(float(line[1])) for line in lines if not line[0].startswith("#") and len(line) == 2}
    positions = [value for name, value in values.items() if name.startswith(AT_POSITION)]
    return {ours: values[theirs] for ours, theirs in COUNTERS.items()} | {"accepted_at": positions}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    found = {name: after[name] - before[name] for name in COUNTERS}
    old = [*before["accepted_at"], *([0] * (len(after["accepted_at"]) - len(before["accepted_at"])))]
    return found | {"accepted_at": [b - a for a, b in zip(old, after["accepted_at"], strict=True)]}


def _asked(address: str, path: str, body: dict[str, Any] | None = None) -> str:
    """Return the answer of the server in this process."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
    connection.request(method, path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != http.client.OK:
        raise RuntimeError(f"{path}: {response.status}: {text}")
    return text
