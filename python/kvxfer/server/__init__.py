# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The reference server: router, prefill and decode workers. Glue over connector, kernels and torch."""
