"""GPU-free lanes: what can be proved about kernels, launchers and generated code without a GPU.

* ahead of time (`test_ahead_of_time`): launchers run on CPU tensors under a null CUDA driver, kernels really compile
  for sm_80, sm_90, sm_100 and gfx942; vector width, spills, registers and rounding are read from the binaries;
* memory trace (`test_memory_trace`, `test_huge_tensors`): in the interpreter, each element read and written as often
  as the byte formula says, nothing out of bounds, no race, no dependence on program order, offsets past 2**31;
* launches and host reads (`test_launches`, `test_host_reads`);
* Inductor (`test_inductor`): number of kernels, opaque calls and divisions in generated code, CUDA's and the CPU's.

A kernel joins by registering cases in `kernel_cases.py`: arguments, a call, and the contract (`cases.KernelCase`).
`audits.py` holds the lanes as functions. `test_planted_faults.py` shows each of them catching faults from `planted.py`.
Private interfaces of Triton and torch are confined to `null_driver.py`, `inspect_binary.py`, `interpreter_trace.py`,
`interpreter_speed.py`, `huge_tensors.py`, `sync_counter.py` and `inductor_cuda.py`. `python -m tests.lanes.report`
prints registers and access widths of every kernel.
"""
