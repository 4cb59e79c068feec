"""The safetensors format, written without a copy. Knows tensors and bytes; nothing of files or experts.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype", "shape", "data_offsets"}, padded with spaces to a multiple of 8
    tensors   row-major, little-endian, one after the other, largest alignment first

Source: https://github.com/huggingface/safetensors ("Format"); its library reads what is written here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from p2pmoe.errors import StateError

DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format has a name for; complex numbers are written as pairs."""


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The chunks of a file. The tensors are on the CPU and contiguous; their memory is not copied.

    Raises StateError for a dtype that the format has no name for.
    """
    if sys.byteorder != "little":
        raise StateError("tensor files are little-endian; this machine is not")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise StateError(f"{name}: a tensor of {tensor.dtype} cannot be kept in a safetensors file")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def decode_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, which stays mapped while they live. Raises StateError whatever the bytes are."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StateError(f"{path} is no whole safetensors file: {error}") from error
