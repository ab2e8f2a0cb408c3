"""The formats that a model is read from: safetensors, PyTorch's .bin, GGUF."""

from checkpoints_conversion.formats.detect import weight_format
from checkpoints_conversion.formats.opening import copy_companions, model_architecture, model_config, open_source

__all__ = ["copy_companions", "model_architecture", "model_config", "open_source", "weight_format"]
