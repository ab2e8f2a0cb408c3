"""Files as bytes: regular files only, JSON without surprises, safetensors without a memory map, dtypes, what a source is."""
