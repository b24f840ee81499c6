# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What every backend needs done on the host: by the extension module, or by NumPy where that was not built."""

from __future__ import annotations

try:
    from kvxfer._kernels_cpu import address_of, cut_segments, host_arrays, tensor_facts
except ImportError:
    from kvxfer.kernels._host_numpy import address_of, cut_segments, host_arrays, tensor_facts

__all__ = ["address_of", "cut_segments", "host_arrays", "tensor_facts"]
