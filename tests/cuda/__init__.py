"""What runs on GPUs, proven without one: tensors that claim to be on CUDA while their numbers stay on the CPU.

Run it with `make test-cuda`, or one file with

    python -m pytest -p tests.cuda.plugin -m pretended_cuda tests/cuda/test_controls.py

The plugin must come first: PyTorch asks once, when it is imported, whether there is a CUDA. `guard.cpp` is what answers then; the
machine's C++ compiler builds it, and where there is none every test here is skipped with that reason.

| file | what is in it |
|---|---|
| guard.cpp, preload.py | the least that PyTorch asks of a CUDA runtime, built once and loaded before torch |
| tensors.py | the tensor subclass and the dispatch mode that every operation passes through |
| operands.py | the tensors among the operands of an operation |
| refusals.py | what CUDA refuses: operands on two devices, a CPU generator, matrix products of integers |
| waits.py | what makes the host wait for the device, and copies out of memory that is not pinned |
| happenings.py | the record of both, by file and line |
| runtime.py | `torch.cuda` of a machine with one or two GPUs: streams, events, pinned memory, threads |
| groups.py, two_processes.py | process groups that serve the devices alone, as those of NCCL do, and a training over one |

A refusal is raised where it happens, as on CUDA, and every test fails at its end too if one was recorded: code that catches
`RuntimeError` hides nothing.

Not true to CUDA: kernels and which of them is chosen (attention runs as plain arithmetic), time, memory, NCCL itself.
"""
