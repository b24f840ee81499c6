# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One worker's engine: sequences, blocks, scheduler, runner, sampling and the loop that drives them."""
