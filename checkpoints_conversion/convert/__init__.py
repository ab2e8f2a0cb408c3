"""The conversion of files: jobs that survive a kill, blocks of bytes, and both directions.

options, targets, progress, memory     what is asked, where to, what is shown
jobs                                   many files, several processes, resumable
blocks, casting                        rectangles as streams of bytes
stored_names, megatron_source          where a parameter is in a Megatron checkpoint; it as Hugging Face tensors
hf_files                               writing Hugging Face weight files
hf_to_megatron, megatron_to_hf         import and export
"""
