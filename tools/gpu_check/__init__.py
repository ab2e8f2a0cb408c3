"""The parts of `tools/gpu_check.sh`: one command that checks and measures what a GPU is needed for.

`__main__` reads the options, runs the chosen stages one after the other and prints a table. Each stage is a process of its own
(`stage`) with a time limit, so that a stage that hangs, or takes the driver down with it, costs no more than itself. What a
stage finds is on disk as soon as it is found.

    env       versions, memory, the ceilings that the others are compared with, Transformer Engine's first FP8 layer
    parity    models, kernels and two-process layouts against transformers and against formulas
    bench     what an update costs (tools/bench_update.py), at the paper's shape
    fp8       what FP8 saves and loses, at the shapes of a 7B model
    vllm      tokens of a vLLM engine against transformers
    train     ten steps through `oprd train`

The process that runs stages imports torch and nothing else, so that it can say what is missing. Modules import each other
relatively: the command finds this package as `gpu_check`, and tests find it as `tools.gpu_check`.
"""
