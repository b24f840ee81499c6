# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Shared by tests, benchmarks and examples; nothing in the library imports it."""
