"""Shards as Parquet files: a row for each picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .shards import Shard


def pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet needs pyarrow: pip install 'vision-token-compression[parquet]'") from error
    return pyarrow


def to_parquet(shard: Shard) -> bytes:
    pa = pyarrow()

    def ragged(flat: np.ndarray) -> Any:
        values = pa.array(flat.ravel())
        if flat.ndim == 2:
            values = pa.FixedSizeListArray.from_arrays(values, flat.shape[1])
        return pa.ListArray.from_arrays(pa.array(shard.offsets, pa.int32()), values)

    widths, heights = zip(*shard.sizes) if shard.sizes else ((), ())
    index = np.zeros(0, np.uint16) if shard.index is None else shard.index
    columns = {
        "name": pa.array(shard.names, pa.string()),
        "width": pa.array(widths, pa.int32()),
        "height": pa.array(heights, pa.int32()),
        "length": pa.array(shard.lengths, pa.int32()),
        "ids" if shard.coded else "values": ragged(shard.tokens),
        # always there, so that all shards have the same columns
        "index": pa.nulls(len(shard), pa.list_(pa.from_numpy_dtype(index.dtype)))
        if shard.index is None
        else ragged(index),
    }
    table = pa.table(columns).replace_schema_metadata({"unreadable": json.dumps(shard.unreadable)})
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def from_parquet(file: Path) -> Shard:
    # read through a handle: a path like a=1/x.parquet would be taken for a partition
    with file.open("rb") as opened:
        table = pyarrow().parquet.read_table(opened)
    tokens = table["ids" if "ids" in table.column_names else "values"].combine_chunks()
    index = table["index"].combine_chunks()
    flat = tokens.flatten()
    if hasattr(flat.type, "list_size"):
        flat = flat.flatten().to_numpy().reshape(-1, flat.type.list_size)
    else:
        flat = flat.to_numpy()
    lengths = table["length"].to_numpy()
    return Shard(
        flat,
        np.concatenate([[0], lengths.cumsum(dtype=np.int64)]),
        table["name"].to_pylist(),
        list(zip(table["width"].to_pylist(), table["height"].to_pylist())),
        None if index.null_count == len(index) else index.flatten().to_numpy(),
        json.loads(table.schema.metadata[b"unreadable"]),
    )
