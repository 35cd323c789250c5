"""What bytes mean: layouts, names, keys, and what becomes of a number.

What affects a format, read or written, lives here, each fact once.  Nothing in this wing knows where bytes are kept or
what somebody wants with them.

===============  =========================================================================================
`layout`         every fixed record on disk, one dtype each
`signatures`     what a file is, by its first bytes
`schema`         the LoRA tensors of a checkpoint in file order: names, ranks, dims
`finetune_keys`  the keys of a finetune checkpoint in GGUF form, one table for reading and writing
`numbers`        the delta of a pair, what a scale does to it, and rounding and overflow when it is written
`decoded`        tensors of other types, or the other way round, shown as a ggcl file would have them
`sums`           the same sums for merging, compiled
`cursor`         variable records, read forward
`gguf_tensors`   the tensor infos of any GGUF file, read
`gguf_header`    its whole header, read
`gguf_keys`      the values of its keys, held to their types
`gguf_shards`    a model in several GGUF files, opened as one
`gguf_writer`    GGUF files, written
`safetensors`    the head of a safetensors file, written
===============  =========================================================================================
"""
