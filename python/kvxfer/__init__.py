# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""kvxfer moves the KV cache of large language models and attends over it where it lands."""

from __future__ import annotations

__version__ = "0.1.0"
