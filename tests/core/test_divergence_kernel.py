"""The Triton kernel of divergence and overlap: its numbers in Triton's interpreter, and that it compiles for GPUs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; PyTorch for CUDA brings it"
)

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, interpreted: bool) -> str:
    """Return the output of another Python: Triton decides on import whether it interprets or compiles kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sums_and_gradients_equal_pytorchs():
    """Both types, rows shorter and longer than a block, a zero-probability token, an exact row, logits far apart."""
    found = json.loads(python("-m", "tests.core.kernel_in_interpreter", interpreted=True))
    assert len(found) == 6
    for name, differences in found.items():
        mixed = "bfloat16" in name
        assert differences["divergence"] < 1e-5, name
        assert differences["overlap"] < 1e-5, name
        assert differences["gradient"] < (1e-2 if mixed else 1e-5), name
        assert differences["planted"] > 1, name


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drafttrain.core import divergence_kernel as kernel

for logits in ("*fp32", "*bf16"):
    sums = {"logits": logits, "log_p": "*fp32", "sums_5": "*fp32", "columns": "i32"}
    sums |= {"logits_stride": "i32", "log_p_stride": "i32", "BLOCK": "constexpr"}
    both = {"logits": logits, "log_p": "*fp32", "sums_5": "*fp32", "slopes_2": "*fp32", "gradient": logits}
    both |= {"columns": "i32", "logits_stride": "i32", "log_p_stride": "i32", "BLOCK": "constexpr"}
    for function, signature in ((kernel.row_sums, sums), (kernel.row_gradients, both)):
        for capability in (80, 90):
            source = ASTSource(function, signature, constexprs={"BLOCK": kernel.BLOCK})
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print(function.__name__, logits, capability, len(made.asm["ptx"]))
"""


@pytest.mark.slow
def test_it_compiles_for_gpus_without_one():
    assert len(python("-c", COMPILE, interpreted=False).splitlines()) == 8


@pytest.mark.gpu
def test_on_a_gpu_it_gives_what_pytorch_gives():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from drafttrain.core.loss_rows import LossRows
    from tests.core.kernel_in_interpreter import difference, rows

    for columns in (7, 5000, 128_256):
        logits_NV, log_p_NV = rows(columns, torch.bfloat16)
        on_gpu = logits_NV.detach().cuda().requires_grad_()
        tokens_N = torch.zeros(6, dtype=torch.long)
        made = []
        for leaf, given in ((logits_NV, log_p_NV), (on_gpu, log_p_NV.cuda())):
            loss_rows = LossRows(leaf, given, tokens_N.to(leaf.device), target_is_normalised=True)
            (gradient,) = torch.autograd.grad(loss_rows.forward_kl_N.sum(), leaf)
            made.append((loss_rows.forward_kl_N.detach().cpu(), gradient.cpu()))
        assert difference(made[1][0], made[0][0]) < 1e-5
        assert difference(made[1][1], made[0][1]) < 1e-2
