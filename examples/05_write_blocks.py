# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks of a paged pool by their ids, all layers in one request, sent once the data are ready."""

from __future__ import annotations

import numpy as np

import kvxfer

LAYERS, BLOCKS, NBYTES = 4, 32, 1024

with (
    kvxfer.TransferEngine("source") as source,
    kvxfer.TransferEngine("target") as target,
):
    theirs = target.allocate(LAYERS * BLOCKS * NBYTES, name="kv")
    mine = source.allocate(LAYERS * BLOCKS * NBYTES, name="kv")
    remote = source.connect(target.address).regions["kv"]

    # Here one layer after the other; there the layers of a block lie together.
    by_layer = kvxfer.BlockView(0, NBYTES, NBYTES, num_layers=LAYERS, layer_stride=BLOCKS * NBYTES)
    by_block = kvxfer.BlockView(0, LAYERS * NBYTES, NBYTES, num_layers=LAYERS, layer_stride=NBYTES)
    here = np.array([3, 4, 5, 17], np.int32)
    there = np.array([20, 1, 9, 8], np.int32)

    ready = kvxfer.Signal()
    transfer = source.write_blocks(mine, remote, by_layer, by_block, here, there, after=ready)
    assert transfer.state == "held"
    mine.array[:] = np.random.default_rng(0).integers(0, 256, mine.nbytes, dtype=np.uint8)
    ready.set()  # with CUDA: cudaLaunchHostFunc(stream, *ready.host_callback())
    transfer.wait(timeout_s=5)

    sent = mine.array.reshape(LAYERS, BLOCKS, NBYTES)[:, here]
    assert np.array_equal(theirs.array.reshape(BLOCKS, LAYERS, NBYTES)[there], sent.swapaxes(0, 1))
    print(f"{transfer.nbytes_done} bytes over {transfer.transport}; {source.stats()['spans']}")
