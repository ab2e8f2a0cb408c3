"""The dtypes of weights under safetensors' names, which this package uses everywhere; torch's names beside them."""

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one number."""
WEIGHT_DTYPES = frozenset({"F32", "F16", "BF16"})
"""What a weight may be."""
