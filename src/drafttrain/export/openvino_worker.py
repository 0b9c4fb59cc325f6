"""Convert a Hugging Face folder to OpenVINO's files. Runs in OpenVINO's own environment, without drafttrain.

`in_engine.py` runs it. The request:

    source     folder of a target or a drafter, weights and tokenizer
    folder     where to write
    taps       EAGLE-3 only: the blocks of the target whose outputs it reads; else null

The answer: `version`; or `error`.
"""

import os
from typing import Any

GRAPH = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"
TOKENIZER = "openvino_tokenizer.xml"


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Write the folder and return the answer to a request."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig
    from optimum.intel.version import __version__

    folder, taps = request["folder"], request["taps"]
    main_export(
        request["source"],
        output=folder,
        task="text-generation-with-past",
        library_name="transformers",
        ov_config=OVConfig(dtype="fp32"),
        # transformers treats optimum-intel's EAGLE-3 class as code that comes with the model.
        trust_remote_code=taps is not None,
        convert_tokenizer=True,
    )
    # A failed conversion is only a warning in optimum-intel, but no pipeline drafts without this file.
    if not os.path.exists(os.path.join(folder, TOKENIZER)):
        raise RuntimeError("the tokenizer was not converted; the reason is in the warnings above")
    if taps is not None:
        _note(folder, "hidden_layers_list", " ".join(map(str, taps)))
    return {"version": __version__}


def _note(folder: str, key: str, value: str) -> None:
    """Write an entry into the rt_info of a graph."""
    import openvino

    graph, beside = os.path.join(folder, GRAPH), os.path.join(folder, "noted.xml")
    model = openvino.Core().read_model(graph)
    model.set_rt_info(value, [key])
    openvino.save_model(model, beside, compress_to_fp16=False)
    del model
    os.replace(beside, graph)
    os.replace(beside.removesuffix(".xml") + ".bin", os.path.join(folder, WEIGHTS))
