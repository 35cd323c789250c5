"""Every fixed record on disk, one dtype each, a line a field: the formats on one page.

All numbers are little-endian.  A `ggcl` file, version 0, is

===========================  =========================================================================
`HEADER`                     92 bytes at offset 0
tensor records               6 + 18 * n_layer of them: `RECORD`, n_dims times u32 dims (innermost first),
                             the name without a terminator, padding to the next multiple of 32 **of the
                             file offset**, then 4 * product(dims) bytes of float32
`OPTIMIZER`                  28 bytes, directly after the last tensor
optimizer records            like tensor records, with empty names; n_dims 0 stands for "absent"
`ADAM_END` or `LBFGS_END`    12 or 24 bytes; the file ends exactly here
===========================  =========================================================================

The header is 92 bytes, data starts at multiples of 32 and is a multiple of 4 bytes long, so every record,
the optimizer's included, starts at a multiple of 4: a checkpoint can be read as 32-bit words throughout.

A `ggla` file, version 1, is `GGLA_HEADER` and then tensor records, as above, to the end of the file.

A GGUF file, version 2 or 3, is `GGUF_HEADER`, the keys with their values, the tensor infos, padding to the next
multiple of the alignment, and the data.  Keys, values and infos are of variable length: `gguf_header` has their form.
What the writer packs in bulk of them, and the tables of tensors in memory, follow at the end.

Nothing in this module runs; it is all data.
"""

from __future__ import annotations

from typing import Final

import numpy as np

__all__ = [
    "ADAM_END", "ALIGNMENT", "GGCL_MAGIC", "GGCL_VERSION", "GGLA_HEADER", "GGLA_MAGIC", "GGLA_VERSION", "GGUF_HEADER",
    "GGUF_MAGIC", "GGUF_TENSOR", "GGUF_TENSOR_INFO", "GGUF_VERSIONS", "HEADER", "LBFGS_END", "OPTIMIZER",
    "OPTIMIZER_VERSION", "RECORD", "TENSOR",
]  # fmt: skip

GGCL_MAGIC: Final = 0x6767636C  # a u32, so that the file starts with the bytes b"lcgg"
GGCL_VERSION: Final = 0  # no other was ever written
OPTIMIZER_VERSION: Final = 1
GGLA_MAGIC: Final = 0x67676C61  # a u32, so that the file starts with the bytes b"algg"
GGLA_VERSION: Final = 1  # no other was ever written
GGUF_MAGIC: Final = b"GGUF"
GGUF_VERSIONS: Final = (2, 3)  # alike in all that is read here; version 1 had 32-bit counts
ALIGNMENT: Final = 32  # of tensor data, in ggcl files and in the GGUF files made from them

HEADER: Final = np.dtype(
    [
        ("magic", "<u4"),  #           0  GGCL_MAGIC
        ("version", "<u4"),  #         4  GGCL_VERSION
        ("train_its", "<u4"),  #       8  iterations so far
        ("train_samples", "<u4"),  #  12  samples seen
        ("train_tokens", "<u4"),  #   16  tokens seen
        ("n_vocab", "<u4"),  #        20
        ("n_embd", "<u4"),  #         24
        ("n_mult", "<u4"),  #         28  n_ff was rounded up to a multiple of it; n_ff itself is not stored
        ("n_head", "<u4"),  #         32
        ("n_layer", "<u4"),  #        36
        ("n_rot", "<u4"),  #          40  rotary dimensions per head
        ("attention_norm", "<u4"),  # 44  from here: LoRA ranks
        ("wq", "<u4"),  #             48
        ("wk", "<u4"),  #             52
        ("wv", "<u4"),  #             56
        ("wo", "<u4"),  #             60
        ("ffn_norm", "<u4"),  #       64
        ("w1", "<u4"),  #             68
        ("w2", "<u4"),  #             72
        ("w3", "<u4"),  #             76
        ("tok_embeddings", "<u4"),  # 80
        ("norm", "<u4"),  #           84
        ("output", "<u4"),  #         88
    ]
)
"""The fixed header of a ggcl file, 92 bytes at offset 0."""

RECORD: Final = np.dtype(
    [
        ("n_dims", "<u4"),  #    0  2 for LoRA tensors, 0 for an absent optimizer tensor
        ("name_len", "<u4"),  #  4  bytes
        ("dtype", "<u4"),  #     8  0 = float32, no other was ever written
    ]
)
"""The fixed part of a tensor record, 12 bytes; dims and name follow."""

OPTIMIZER: Final = np.dtype(
    [
        ("version", "<u4"),  #           0  OPTIMIZER_VERSION
        ("past", "<i4"),  #              4  number of past loss values kept
        ("lbfgs_m", "<i4"),  #           8  number of L-BFGS corrections kept; 0 in real Adam files
        ("nx", "<i8"),  #               12  number of LoRA elements
        ("iter", "<i4"),  #             20
        ("just_initialized", "<i4"),  # 24
    ]
)
"""The fixed part of the optimizer state, 28 bytes.  It does not say which optimizer it is."""

ADAM_END: Final = np.dtype(
    [
        ("fx_best", "<f4"),  #           0
        ("fx_prev", "<f4"),  #           4
        ("n_no_improvement", "<i4"),  #  8
    ]
)
"""The last 12 bytes of a checkpoint trained with Adam."""

LBFGS_END: Final = np.dtype(
    [
        ("fx_best", "<f4"),  #            0
        ("step", "<f4"),  #               4
        ("j", "<i4"),  #                  8
        ("k", "<i4"),  #                 12
        ("end", "<i4"),  #               16
        ("n_no_improvement", "<i4"),  #  20
    ]
)
"""The last 24 bytes of a checkpoint trained with L-BFGS."""

GGLA_HEADER: Final = np.dtype(
    [
        ("magic", "<u4"),  #       0  GGLA_MAGIC
        ("version", "<u4"),  #     4  GGLA_VERSION
        ("lora_r", "<u4"),  #      8  what lora_alpha is divided by; ranks of norms differ from it
        ("lora_alpha", "<u4"),  # 12  deltas count lora_alpha / lora_r times
    ]
)
"""The fixed header of a ggla file, 16 bytes at offset 0."""

GGUF_HEADER: Final = np.dtype(
    [
        ("magic", "S4"),  #        0  GGUF_MAGIC
        ("version", "<u4"),  #     4  one of GGUF_VERSIONS
        ("n_tensors", "<u8"),  #   8
        ("n_kv", "<u8"),  #       16  keys
    ]
)
"""The fixed header of a GGUF file, 24 bytes at offset 0."""

GGUF_TENSOR_INFO: Final = np.dtype(
    [
        ("n_dims", "<u4"),  #  0
        ("ne", "<u8", (2,)),  #  4  innermost first; one dim only: 8 bytes shorter
        ("dtype", "<u4"),  #  20  0 = float32
        ("offset", "<u8"),  # 24  from the start of the data section
    ]
)
"""What follows the name in the GGUF tensor info of a two-dimensional tensor, 32 bytes."""

TENSOR: Final = np.dtype(
    [
        ("record", "i8"),  #       byte offset of the record in the source; 0 where it is a GGUF file
        ("offset", "i8"),  #       byte offset of the data in the source
        ("nbytes", "i8"),  #       bytes of data; 0 for an absent tensor
        ("ne0", "i8"),  #          innermost dim; 0 for an absent tensor
        ("ne1", "i8"),  #          outer dim; 1 for a one-dimensional tensor
        ("n_dims", "i4"),  #       0, 1 or 2
        ("renamed", "i4"),  #      1 where the name in the file is not the expected one
        ("gguf_offset", "i8"),  #  byte offset of the data in the GGUF data section
    ]
)
"""A row of the table that the sweep fills: where each tensor is, and where it goes.  In memory only."""

GGUF_TENSOR: Final = np.dtype(
    [
        ("info", "i8"),  #        byte offset of the tensor info, which begins with the name's length
        ("dims", "i8"),  #        byte offset of the dims in it
        ("n_dims", "i8"),  #      1 to 4
        ("ne", "i8", (4,)),  #    innermost first; 1 beyond n_dims
        ("type", "i8"),  #        a gguf.GGMLQuantizationType
        ("offset", "i8"),  #      byte offset of the data in the file
        ("nbytes", "i8"),  #      bytes of data
    ]
)
"""A row of the table of tensors of any GGUF file.  In memory only."""
