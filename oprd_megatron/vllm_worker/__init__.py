"""What runs inside a vLLM process, whose environment has torch, safetensors and vLLM and nothing else of ours.

`buckets` is the format that weights travel in (the trainer imports it too), `worker` loads them into vLLM, `launch` is the
program that a server is started with, `watch` ends a server that nobody owns any more.
"""
